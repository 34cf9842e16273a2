"""Every causal model type that transformers knows: equal to padded, or padded for a reason."""

import re
import subprocess
import sys

import pytest

from tests.kit import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "families.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)


def test_no_family_is_silently_different_and_the_table_in_the_docs_is_current():
    import transformers

    result = run()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = verdicts(result.stdout)
    assert sum(verdict == "equal" for verdict in found.values()) >= 20
    page = ROOT / "docs" / f"families-{transformers.__version__}.md"
    if page.exists():
        assert verdicts(page.read_text()) == found


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("families-*.md")), ids=lambda page: page.stem)
def test_a_committed_table_has_no_family_without_a_verdict(page):
    allowed = r"equal|padded, because .+|not tried: .+"
    assert all(re.fullmatch(allowed, verdict) for verdict in verdicts(page.read_text()).values())


def verdicts(text: str) -> dict[str, str]:
    """{family: "equal" or the reason}, from the two tables of a page."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: "equal" if len(row) == 4 else row[1] for row in rows if row[0] != "family"}
