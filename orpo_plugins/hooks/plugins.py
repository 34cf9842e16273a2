"""The plugin manager, and look-ups by name with an error that lists what there is."""

import functools
from collections.abc import Iterable
from typing import Protocol, TypeVar

import pluggy
import torch

from orpo_plugins.errors import ConfigError
from orpo_plugins.hooks import specs
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.types import Kernel, Method, Metric, RowFormat
from orpo_plugins.objective import LossTerm

GROUP = "orpo_plugins"
REFERENCE_LAYOUT = "padded"
"""The layout that every decoder can run, with which others are compared and by which they are replaced."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=_Named)


@functools.cache
def get_plugin_manager() -> pluggy.PluginManager:
    """The process-wide manager, with the built-in plugins and every installed entry point registered."""
    from orpo_plugins.hooks import builtin

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(specs)
    for name, plugin in builtin.plugins().items():
        manager.register(plugin, name=name)
    manager.load_setuptools_entrypoints(GROUP)
    manager.check_pending()
    return manager


def row_formats() -> list[RowFormat]:
    """All row formats, in the order in which they are tried."""
    return _flatten(get_plugin_manager().hook.orpo_row_formats())


def metrics() -> list[Metric]:
    """All metrics that plugins add."""
    return _flatten(get_plugin_manager().hook.orpo_metrics())


def methods(framework: str) -> list[Method]:
    """The methods announced to one framework."""
    return [method for method in _flatten(get_plugin_manager().hook.orpo_methods()) if method.framework == framework]


def loss_term(name: str) -> LossTerm:
    """The per-pair term of that name."""
    known: list[LossTerm] = _flatten(get_plugin_manager().hook.orpo_loss_terms())
    return _by_name("loss term", name, known)


def layouts() -> list[Layout]:
    """All layouts."""
    return _flatten(get_plugin_manager().hook.orpo_layouts())


def layout(name: str) -> Layout:
    """The layout of that name."""
    return _by_name("layout", name, layouts(), also=("auto",))


def best_layout(name: str, model: torch.nn.Module) -> tuple[Layout, dict[str, str]]:
    """The layout to use for `model`, and why each preferred one was passed over (by name).

    Raises `ConfigError` where a layout asked for by name cannot be used.
    """
    if name != "auto":
        chosen = layout(name)
        if reason := chosen.unsupported(model):
            raise ConfigError(f"layout {name!r} cannot be used here: {reason}. Use layout='auto'")
        return chosen, {}
    passed_over: dict[str, str] = {}
    for candidate in sorted(layouts(), key=lambda candidate: -candidate.priority):
        reason = candidate.unsupported(model)
        if reason is None:
            return candidate, passed_over
        passed_over[candidate.name] = reason
    raise ConfigError(f"no layout supports this model: {passed_over}")


def kernels() -> list[Kernel]:
    """All head kernels."""
    return _flatten(get_plugin_manager().hook.orpo_kernels())


def kernel(name: str, device: torch.device) -> Kernel:
    """The kernel of that name, or for "auto" the supported one of highest priority.

    Raises `ConfigError` for an unknown name or a kernel that cannot run on `device`.
    """
    if name == "auto":
        return max((k for k in kernels() if k.unsupported(device) is None), key=lambda k: k.priority)
    chosen = known_kernel(name)
    if reason := chosen.unsupported(device):
        raise ConfigError(f"kernel {name!r} cannot be used on {device}: {reason}. Use kernel='auto'")
    return chosen


def known_kernel(name: str) -> Kernel:
    """The kernel of that name, whatever device it runs on; `ConfigError` for an unknown name."""
    return _by_name("kernel", name, kernels(), also=("auto",))


def _flatten(results: Iterable[Iterable[NamedT]]) -> list[NamedT]:
    return [item for result in results for item in result]


def _by_name(kind: str, name: str, known: Iterable[NamedT], also: tuple[str, ...] = ()) -> NamedT:
    items = list(known)
    for item in items:
        if item.name == name:
            return item
    names = ", ".join(sorted({*also, *(item.name for item in items)})) or "none"
    raise ConfigError(f"unknown {kind} {name!r}; known: {names}")
