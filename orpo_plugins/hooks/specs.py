"""Every hook, in one place.

A plugin is a module or an object with functions of these names that carry `orpo_plugins.hookimpl`.  An entry point in
the group `orpo_plugins` registers it wherever its package is installed, and `get_plugin_manager().register(plugin)` in
one process.  The built-in parts are such plugins.

A hook takes no argument and returns a list of parts.  It is called when its parts are first asked for, and again only
after plugins have been registered or unregistered.  The names of parts of one kind are unique over all plugins.  A hook
that raises, or returns something else, stops the run with a `PluginError`.
"""

from collections.abc import Sequence

import pluggy

from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.types import Kernel, Metric, RowFormat
from orpo_plugins.objective import LossTerm

hookspec = pluggy.HookspecMarker("orpo_plugins")
hookimpl = pluggy.HookimplMarker("orpo_plugins")


@hookspec
def orpo_row_formats() -> Sequence[RowFormat]:
    """Ways to read a row; the first format that matches reads it, and plugins registered later are asked first."""


@hookspec
def orpo_layouts() -> Sequence[Layout]:
    """Ways to lay out pairs, for `layout=<name>`; "auto" takes the first by priority that supports the model."""


@hookspec
def orpo_kernels() -> Sequence[Kernel]:
    """Ways to compute the head, for `kernel=<name>`; "auto" takes the first by priority that supports the tensors."""


@hookspec
def orpo_loss_terms() -> Sequence[LossTerm]:
    """Losses per pair, which `loss_terms={name: weight}` adds to the objective; none is added unless it is named."""


@hookspec
def orpo_metrics() -> Sequence[Metric]:
    """Values per pair, whose means are logged beside the built-in metrics, in training and in evaluation."""
