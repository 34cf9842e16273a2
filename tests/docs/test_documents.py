"""What the documents say is what was measured, and what they name exists."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_figures_in_documents_are_those_of_the_results() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "quote.py"), "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, f"run python benchmarks/quote.py: {run.stdout}{run.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_every_option_stands_in_the_tables() -> None:
    fields = dataclasses.fields(pytest.importorskip("orpo_plugins.options").ORPOFields)
    tables = [line for name in ("README.md", "docs/trainer.md") for line in (ROOT / name).read_text().splitlines()]
    named = {name for line in tables if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {field.name for field in fields} <= named
