"""What plugins offer through a hook: collected, checked, and guarded.

The functions of third-party parts are wrapped once, when they are collected, so that an error names the plugin that it
comes from.  Built-in parts stay as they are.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import NoneType
from typing import Any

import torch
from pluggy import HookImpl
from torch import Tensor

from orpo_plugins.errors import ORPOError, PluginError
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.manager import get_plugin_manager
from orpo_plugins.hooks.types import HeadResult, Kernel, Metric, Preference, RowFormat
from orpo_plugins.objective import LossTerm, PairLogps

Returns = type | tuple[type, ...]

_REASON = (str, NoneType)
_PARTS: Mapping[str, tuple[type, Mapping[str, Returns]]] = {
    "orpo_row_formats": (RowFormat, {"matches": object, "parse": Preference}),
    "orpo_layouts": (
        Layout,
        {
            "collate": dict,
            "unsupported": _REASON,
            "prepare": object,
            "forward_context": AbstractContextManager,
            "model_inputs": dict,
            "token_cost": Tensor,
            "longest_sequence": (int, NoneType),
        },
    ),
    "orpo_kernels": (Kernel, {"compute": HeadResult, "unsupported": _REASON}),
    "orpo_loss_terms": (LossTerm, {"compute": Tensor}),
    "orpo_metrics": (Metric, {"compute": Tensor}),
}
"""By hooks: the class of their parts, and the functions of one with what they return."""

# The package's own errors say what is wrong already.  Where memory runs out, the Trainer's `auto_find_batch_size` looks
# for the error itself.
_PASSED_ON = (ORPOError, MemoryError, torch.OutOfMemoryError)


def offered(hook: str) -> tuple[Any, ...]:
    """All parts that plugins return from a hook, those of the plugin that was registered last first.

    A hook is called again only after plugins have been registered or unregistered.

    Raises:
        PluginError: a hook raises, does not return a list of its parts, or two parts have one name.
    """
    implementations = getattr(get_plugin_manager().hook, hook).get_hookimpls()
    return _collected(hook, tuple(reversed(implementations)))


@functools.lru_cache(maxsize=16)
def _collected(hook: str, implementations: tuple[HookImpl, ...]) -> tuple[Any, ...]:
    manager, kind = get_plugin_manager(), _PARTS[hook][0].__name__
    parts: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for implementation in implementations:
        plugin = implementation.plugin_name
        offer: Any = implementation.function() if plugin in manager.builtin else _of_third_party(implementation, hook)
        for part in offer:
            if part.name in parts:
                one, other = sorted([plugin, owners[part.name]], key=lambda name: name not in manager.builtin)
                raise PluginError(
                    f"two plugins have a {kind} named {part.name!r}: {manager.label(one)} and {manager.label(other)}. "
                    f"{manager.way_out(other)}"
                )
            parts[part.name], owners[part.name] = part, plugin
    return tuple(parts.values())


def _of_third_party(implementation: HookImpl, hook: str) -> list[Any]:
    """What the hook of a third-party plugin returns, checked and guarded."""
    manager, kind = get_plugin_manager(), _PARTS[hook][0]
    where = f"plugin {manager.label(implementation.plugin_name)}, hook {hook}"
    way_out = manager.way_out(implementation.plugin_name)
    parts = _reporting(implementation.function, (list, tuple), where, way_out, passed_on=(PluginError,))()
    for part in parts:
        if not isinstance(part, kind):
            raise PluginError(f"{where} returned a list with {_described(part)}, not {kind.__name__}. {way_out}")
        name = getattr(part, "name", None)
        if not isinstance(name, str) or name in ("", "auto"):
            raise PluginError(f"{where} returned a {kind.__name__} with the name {name!r}. {way_out}")
    return [_guarded(part, hook, where, way_out) for part in parts]


def _guarded(part: Any, hook: str, where: str, way_out: str) -> Any:
    """A copy of a part whose functions report their errors under the plugin's name."""
    kind, functions = _PARTS[hook]
    part = copy.copy(part)
    for name, returns in functions.items():
        function = getattr(part, name)
        place = f"{where}: {name} of {kind.__name__} {part.name!r}"
        if not callable(function):
            raise PluginError(f"{place} is {_described(function)}, not a function. {way_out}")
        checked = _one_number_per_pair(function) if kind is LossTerm else function
        # Frozen dataclasses allow no other way.
        object.__setattr__(part, name, _reporting(checked, returns, place, way_out))
    return part


def _one_number_per_pair(compute: Callable[[PairLogps], Tensor]) -> Callable[[PairLogps], Tensor]:
    """A scalar, a mean over pairs for one, would be taken for the value of each pair without an error."""

    @functools.wraps(compute)
    def checked(pairs: PairLogps) -> Tensor:
        values = compute(pairs)
        if isinstance(values, Tensor) and values.shape != pairs.chosen.shape:
            raise ValueError(
                f"it returned shape {tuple(values.shape)} for {len(pairs.chosen)} pairs, and must return one number "
                "per pair, [B]"
            )
        return values

    return checked


def _reporting(
    function: Callable[..., Any],
    returns: Returns,
    place: str,
    way_out: str,
    *,
    passed_on: tuple[type[Exception], ...] = _PASSED_ON,
) -> Callable[..., Any]:
    """The function with a `PluginError` for what it raises, except `passed_on`, and for a wrong return value."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except passed_on:
            raise
        except Exception as error:
            raise PluginError(f"{place} raised {type(error).__name__}: {error}. {way_out}") from error
        if not isinstance(result, returns):
            expected = returns if isinstance(returns, tuple) else (returns,)
            names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in expected)
            raise PluginError(f"{place} returned {_described(result)}, not {names}. {way_out}")
        return result

    return call


def _described(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
