"""What the documents say is what was measured, and what they name exists."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orpo_plugins
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


def walk() -> list[str]:
    """The rows of the table "Where to change X"."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Where to change X")[2]
    return [line for line in table.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", walk(), ids=lambda row: row.split("|")[1].strip())
def test_files_and_names_of_the_walk_are_there(row: str) -> None:
    sources = [path for folder in ("orpo_plugins", "kernels", "integrations") for path in (ROOT / folder).rglob("*.py")]
    named = [name for name in re.findall(r"`([\w/]+\.py)", row) if not name.startswith("benchmarks/")]
    found = {name: [path for path in sources if str(path).endswith(f"/{name}")] for name in named}
    assert all(found.values()), found
    text = "".join(path.read_text() for paths in found.values() for path in paths)
    assert not [name for name in re.findall(r"`(\w+)`", row) if name != "auto" and name not in text]


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert not [name for name in dir(orpo_plugins) if f"\n::: orpo_plugins.{name}\n" not in pages]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700


def test_every_option_stands_in_the_tables() -> None:
    fields = dataclasses.fields(pytest.importorskip("orpo_plugins.options").ORPOFields)
    table = (ROOT / "docs" / "options.md").read_text().splitlines()
    named = {name for line in table if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {field.name for field in fields} <= named
