"""What the layout of the repository has to keep true."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import orpo_plugins
from tests.kit import ROOT

NEEDS_AXOLOTL = {"ORPOPlugin"} if importlib.util.find_spec("axolotl") is None else set()
"""Public names that cannot be loaded here."""


@pytest.mark.parametrize("folder", ["kernels", "integrations"])
def test_root_folders_are_no_packages(folder: str) -> None:
    # `kernels` is also a package that transformers imports: an __init__.py at the root would shadow it.
    assert not (ROOT / folder / "__init__.py").exists()
    spec = importlib.util.find_spec(folder)
    assert spec is None or spec.origin is None or Path(spec.origin).parent != ROOT / folder


def test_importing_the_package_imports_no_trainer_framework() -> None:
    code = (
        "import sys, orpo_plugins; from orpo_plugins import hookimpl, get_plugin_manager, orpo_loss, linear_orpo_loss;"
        "from orpo_plugins import orpo_forward, ORPOCollator, setup_chat_format; get_plugin_manager();"
        "print([m for m in ('transformers', 'trl', 'axolotl', 'peft', 'datasets', 'accelerate') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    contract = {
        "FusedLinearORPOLoss",
        "ORPOCollator",
        "ORPOConfig",
        "ORPOLoss",
        "ORPOPlugin",
        "ORPOTrainer",
        "fuse_head",
        "get_plugin_manager",
        "hookimpl",
        "linear_orpo_loss",
        "orpo_forward",
        "orpo_loss",
        "setup_chat_format",
        "step_totals",
    }
    assert set(dir(orpo_plugins)) == contract
    for name in contract - NEEDS_AXOLOTL:
        assert getattr(orpo_plugins, name).__doc__, name


@pytest.mark.slow
@pytest.mark.parametrize("absent", [None, "axolotl"])
def test_a_star_import_leaves_out_what_needs_an_absent_framework(absent: str | None) -> None:
    # An entry of None in sys.modules is what Python takes for a package that is not installed.
    code = (
        f"import sys; sys.modules.update({dict.fromkeys([absent] if absent else [])}); from orpo_plugins import *\n"
        "import orpo_plugins; print(*sorted(set(dir(orpo_plugins)) - globals().keys()))\n"
        "try: from orpo_plugins import ORPOPlugin\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    if absent or NEEDS_AXOLOTL:
        assert run.stdout == (
            "ORPOPlugin\nthis needs axolotl, which is not installed: pip install 'orpo-plugins[axolotl]'\n"
        )
    else:
        assert run.stdout == "\n"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ORPOTrainr'; it has FusedLinearORPOLoss"):
        orpo_plugins.ORPOTrainr  # noqa: B018
