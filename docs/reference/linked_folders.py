"""Shows griffe the folders that orpo_plugins reaches by links.

They have no `__init__.py` (CONTRIBUTING.md says why), and griffe passes over such folders inside of a package.
"""

from typing import Any

import griffe


class LinkedFolders(griffe.Extension):
    """Adds both as modules before griffe looks for their files."""

    def on_module_instance(self, *, mod: griffe.Module, **_: Any) -> None:
        """Called for every module, the package first."""
        if mod.path == "orpo_plugins":
            for name in ("kernels", "integrations"):
                mod.set_member(name, griffe.Module(name, filepath=[mod.filepath.parent / name]))
