"""Every hook, in one place.

A plugin is any module or object whose functions carry `orpo_plugins.hookimpl`, registered by an entry point
in group `orpo_plugins` or by `get_plugin_manager().register(plugin)`.  The built-in parts are such plugins.
"""

from collections.abc import Sequence

import pluggy

from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.types import Kernel, Method, Metric, RowFormat
from orpo_plugins.objective import LossTerm

hookspec = pluggy.HookspecMarker("orpo_plugins")
hookimpl = pluggy.HookimplMarker("orpo_plugins")


@hookspec
def orpo_row_formats() -> Sequence[RowFormat]:  # type: ignore[empty-body]  # a specification has no body
    """Row formats; those of plugins registered later are tried first, and the first that matches reads the row."""


@hookspec
def orpo_layouts() -> Sequence[Layout]:  # type: ignore[empty-body]
    """Batch layouts, for `layout=<name>`; `auto` takes the one of highest priority that the model supports."""


@hookspec
def orpo_kernels() -> Sequence[Kernel]:  # type: ignore[empty-body]
    """Head kernels, for `kernel=<name>`; `auto` takes the one of highest priority that the device supports."""


@hookspec
def orpo_loss_terms() -> Sequence[LossTerm]:  # type: ignore[empty-body]
    """Per-pair terms that `loss_terms={name: weight}` adds to the objective; none is active unless selected."""


@hookspec
def orpo_metrics() -> Sequence[Metric]:  # type: ignore[empty-body]
    """Figures logged beside the built-in ones, in training and evaluation."""


@hookspec
def orpo_methods() -> Sequence[Method]:  # type: ignore[empty-body]
    """Training methods announced to a framework: its trainer and config classes by import path."""
