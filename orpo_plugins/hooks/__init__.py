"""Everything that the author of a plugin imports.

from orpo_plugins import hooks

@hooks.hookimpl
def orpo_loss_terms():
    return [hooks.LossTerm(name="simpo", compute=simpo)]
"""

from orpo_plugins.hooks.layout import Layout, PairLengths
from orpo_plugins.hooks.manager import get_plugin_manager
from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import (
    HeadOptions,
    HeadResult,
    Kernel,
    KernelFunction,
    Message,
    Metric,
    Objective,
    Pair,
    Preference,
    RowFormat,
    TokenSequence,
)
from orpo_plugins.objective import LossTerm, ORPOOutput, PairLogps
from orpo_plugins.targets import Targets

__all__ = [
    "HeadOptions",
    "HeadResult",
    "Kernel",
    "KernelFunction",
    "Layout",
    "LossTerm",
    "Message",
    "Metric",
    "ORPOOutput",
    "Objective",
    "Pair",
    "PairLengths",
    "PairLogps",
    "Preference",
    "RowFormat",
    "Targets",
    "TokenSequence",
    "get_plugin_manager",
    "hookimpl",
]
