"""Who may import whom: core <- kernels, core <- adapters; nothing in the core or in a kernel knows an adapter."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.kit import ROOT

CORE = [path for path in (ROOT / "orpo_plugins").rglob("*.py") if not {"kernels", "integrations"} & {*path.parts}]
LAZY_NAMES = ROOT / "orpo_plugins" / "__init__.py"


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, on top or inside of a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_nothing_in_the_core_or_in_a_kernel_imports_an_adapter() -> None:
    files = [path for path in [*CORE, *(ROOT / "kernels").glob("*.py")] if path != LAZY_NAMES]
    assert len(files) > 30
    found = [(path.name, name) for path in files for name in imported(path) if "orpo_plugins.integrations" in name]
    assert found == []


def test_hooks_import_no_room_but_their_built_in_plugins() -> None:
    rooms = ("data", "layouts", "models", "kernels", "forward")
    files = [path for path in CORE if path.parent.name == "hooks" and path.name != "builtin.py"]
    found = [
        (path.name, name) for path in files for name in imported(path) if name.split(".")[1:2] in [[r] for r in rooms]
    ]
    assert found == []
