"""Every test that docs/comparison.md and docs/support.md name is there, every footnote has its text, rows are whole."""

import re

import pytest

from tests.kit import ROOT

DOCUMENTS = {name: (ROOT / "docs" / name).read_text() for name in ("comparison.md", "support.md")}
NAMED = sorted({test for text in DOCUMENTS.values() for test in re.findall(r"`(\w+/test_\w+\.py::\w+)`", text)})


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_a_footnote_names_exists(named: str) -> None:
    file, _, function = named.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), named


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_footnote_is_used_and_has_its_text(name: str) -> None:
    marks = re.findall(r"\[\^(\w+)\](:?)", DOCUMENTS[name])
    assert {mark for mark, colon in marks if colon} == {mark for mark, colon in marks if not colon}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_row_has_a_cell_for_each_column(name: str) -> None:
    tables = [part.strip().splitlines() for part in re.findall(r"(?:^\|.*\n)+", DOCUMENTS[name], re.MULTILINE)]
    assert [{line.count("|") for line in table} for table in tables] == [{table[0].count("|")} for table in tables]
    if name == "comparison.md":
        assert sum(line.count("|") == 10 for table in tables for line in table) >= 45
