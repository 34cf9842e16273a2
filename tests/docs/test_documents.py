"""What the documents say is what was measured, and what they name exists."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FOLDERS = "benchmarks|docs|examples|integrations|kernels|orpo_plugins|tests"


def test_figures_in_documents_are_those_of_the_results() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, f"run python benchmarks/figures.py: {run.stdout}{run.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_repository_that_are_named_exist(document: Path) -> None:
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", document.read_text())
    missing = [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700


def test_every_option_stands_in_the_tables() -> None:
    fields = dataclasses.fields(pytest.importorskip("orpo_plugins.options").ORPOFields)
    table = (ROOT / "docs" / "options.md").read_text().splitlines()
    named = {name for line in table if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {field.name for field in fields} <= named
