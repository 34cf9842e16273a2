"""Every causal model type that transformers knows: equal to padded, or padded for a reason."""

import json
import re
import subprocess
import sys

import pytest

from tests.kit import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "families.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)


@pytest.mark.slow
def test_no_family_is_silently_different_and_the_committed_verdicts_are_current():
    import transformers

    result = run()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = verdicts(result.stdout)
    assert sum(verdict == "equal" for verdict in found.values()) >= 20
    committed = RESULTS / f"families-{transformers.__version__}.json"
    if committed.exists():
        assert verdicts(committed.read_text()) == found


@pytest.mark.parametrize("committed", sorted(RESULTS.glob("families-*.json")), ids=lambda path: path.stem)
def test_a_committed_table_has_no_family_without_a_verdict(committed):
    allowed = r"equal|padded, because .+|not tried: .+"
    assert all(re.fullmatch(allowed, verdict) for verdict in verdicts(committed.read_text()).values())


def verdicts(text: str) -> dict[str, str]:
    """{family: "equal" or the reason}."""
    rows = json.loads(text[text.index("[\n") :])  # libraries may print before it
    return {row["family"]: row["verdict"] for row in rows}
