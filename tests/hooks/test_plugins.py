"""Hooks: what is built in comes through them, and an installed package adds to it."""

import json
import os
import subprocess
import sys

import pluggy
import pytest
import torch

from orpo_plugins import errors, get_plugin_manager, hookimpl
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks import specs as hookspecs
from orpo_plugins.hooks.types import Kernel
from tests.kit import ROOT

PROBE = """
import json, torch
from orpo_plugins import linear_orpo_loss
from orpo_plugins.hooks import plugins
from orpo_plugins.options import ORPOOptions
from orpo_plugins.data.row_formats import parse_row
row = parse_row({"question": "Why", "good": "Because.", "bad": "No."}, 0)
torch.manual_seed(0)
hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
losses = [linear_orpo_loss(hidden, weight, labels, kernel=name).loss.item() for name in ("reference", "double")]
print(json.dumps({
    "prompt": row.prompt, "losses": losses, "metrics": [m.name for m in plugins.metrics()],
    "terms": dict(ORPOOptions(loss_terms={"simpo": 0.5}).loss_terms),
    "plugins": [name for name, _ in plugins.get_plugin_manager().list_name_plugin()],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The example package, really installed, seen from a fresh interpreter."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    source = tmp_path_factory.mktemp("source") / "plugin"
    source.mkdir()
    for name in ("pyproject.toml", "orpo_example_plugin.py"):
        (source / name).write_text((ROOT / "examples" / "plugin" / name).read_text())
    subprocess.run([*pip, str(source)], check=True, capture_output=True, text=True)
    path = os.pathsep.join([str(target), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


def test_an_installed_package_is_registered_by_its_entry_point(installed: dict[str, object]) -> None:
    assert "example" in installed["plugins"]  # type: ignore[operator]


def test_an_installed_package_adds_a_row_format(installed: dict[str, object]) -> None:
    assert installed["prompt"] == "Why? "


def test_an_installed_package_adds_a_kernel(installed: dict[str, object]) -> None:
    reference, double = installed["losses"]  # type: ignore[misc]
    assert double == pytest.approx(reference, rel=1e-6)


def test_an_installed_package_adds_a_loss_term_and_a_metric(installed: dict[str, object]) -> None:
    assert installed["terms"] == {"simpo": 0.5}
    assert "length_gap" in installed["metrics"]  # type: ignore[operator]


def test_everything_built_in_is_registered_through_the_hooks() -> None:
    names = {name for name, _ in get_plugin_manager().list_name_plugin()}
    assert {"orpo-row-formats", "orpo-layouts", "orpo-kernel-reference", "orpo-kernel-chunked"} <= names
    assert {"reference", "chunked"} <= {kernel.name for kernel in plugins.kernels()}
    assert {"padded"} <= {layout.name for layout in plugins.layouts()}
    assert {method.framework for fw in ("trl", "axolotl", "transformers") for method in plugins.methods(fw)} == {
        "trl",
        "axolotl",
        "transformers",
    }


@pytest.mark.parametrize("hook", [name for name in dir(hookspecs) if name.startswith("orpo_")])
def test_every_hook_is_documented(hook: str) -> None:
    assert getattr(hookspecs, hook).__doc__
    assert hook in (ROOT / "docs" / "plugins.md").read_text()


def test_an_unknown_hook_is_refused() -> None:
    class Misspelt:
        @hookimpl
        def orpo_kernel(self) -> list[Kernel]:
            return []

    manager = get_plugin_manager()
    plugin = Misspelt()
    manager.register(plugin)
    try:
        with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'orpo_kernel'"):
            manager.check_pending()
    finally:
        manager.unregister(plugin)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(errors.ConfigError, match=r"unknown kernel 'fast'; known: auto, chunked,.*reference"):
        plugins.kernel("fast", torch.device("cpu"))
    with pytest.raises(errors.ConfigError, match=r"unknown layout 'dense'; known: auto,.*padded"):
        plugins.layout("dense")
    with pytest.raises(errors.ConfigError, match="unknown loss term 'dpo'; known: none"):
        plugins.loss_term("dpo")


def test_a_kernel_that_cannot_run_here_says_why() -> None:
    class Elsewhere:
        @hookimpl
        def orpo_kernels(self) -> list[Kernel]:
            return [Kernel(name="elsewhere", compute=None, unsupported=lambda d: f"it needs a TPU, not {d.type}")]  # type: ignore[arg-type]

    plugin = Elsewhere()
    get_plugin_manager().register(plugin)
    try:
        with pytest.raises(
            errors.ConfigError, match="kernel 'elsewhere' cannot be used on cpu: it needs a TPU, not cpu"
        ):
            plugins.kernel("elsewhere", torch.device("cpu"))
        assert plugins.kernel("auto", torch.device("cpu")).name != "elsewhere"
    finally:
        get_plugin_manager().unregister(plugin)
