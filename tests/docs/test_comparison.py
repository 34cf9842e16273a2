"""Every test that docs/comparison.md names is there."""

import re

import pytest

from tests.kit import ROOT

DOCUMENT = (ROOT / "docs" / "comparison.md").read_text()


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(\w+/test_\w+\.py::\w+)`", DOCUMENT))))
def test_a_test_that_the_table_names_exists(named: str) -> None:
    file, _, function = named.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), named


def test_every_row_has_a_cell_for_each_framework() -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {10}
