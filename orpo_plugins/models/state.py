"""What has been found out about a model, kept for as long as the model exists.

It is kept beside the model and not as an attribute of it, so that copying or saving the model leaves it out.
"""

import weakref
from dataclasses import dataclass, field

from torch import nn

from orpo_plugins.hooks.types import HeadOptions


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What `models/checks.py` has found out about a model by running it on a few tokens."""

    leak: float
    """How much logits change with the tokens behind them, relative to their length; 0 for a causal model."""
    tolerance: float
    """How much they may change."""
    tokens: int | None
    """How many tokens a row may have, beside virtual ones; None where no table of positions limits them."""
    encoder_tokens: int | None = None
    """The same for the input of an encoder."""


@dataclass(kw_only=True, eq=False)
class ModelState:
    """What is known about one model."""

    head_options: HeadOptions | None = None
    """Scale and soft-cap of its logits; None as long as `models/head.py` has not run its probe."""
    examined: dict[tuple[tuple[int, int], bool], Examined] = field(default_factory=dict)
    """By the virtual tokens that an adapter puts before its rows, and by whether it was in training mode."""
    layouts: set[tuple[str, str | None]] = field(default_factory=set)
    """Layouts that it can run in, each with the attention implementation that it had then."""
    config_readers: "list[weakref.ref[nn.Module]]" = field(default_factory=list)
    """Its modules that read an attention implementation from their configuration; found by `layouts/attention.py`."""


_states: "weakref.WeakKeyDictionary[nn.Module, ModelState]" = weakref.WeakKeyDictionary()


def state_of(model: nn.Module) -> ModelState:
    """What is known about this very module: a wrapper (with an adapter, say) and the model inside have one each."""
    return _states.setdefault(model, ModelState())
