"""Arguments that TRL or transformers have renamed or removed, and that tutorials still pass.

Each one is translated, with a `FutureWarning`.  A value that has no equivalent any more is an error.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from orpo_plugins.errors import ConfigError

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "orpo_alpha": "beta",
    "orpo_beta": "odds_temperature",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
"""Old name: the name of today, which takes the same value."""

_WITHOUT_EFFECT = {
    "overwrite_output_dir": "an existing output_dir is never emptied; pass resume_from_checkpoint to continue a run",
    "save_safetensors": "checkpoints are always safetensors",
    "logging_dir": "set the TENSORBOARD_LOGGING_DIR environment variable instead",
    "is_encoder_decoder": "read from the model",
}
"""Old name: why passing it changes nothing."""


def translate(given: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The `given` keyword arguments with old names replaced by `known` ones.

    Raises `ConfigError` where an old and its new name are both given, or an old value has no equivalent.
    """
    arguments = dict(given)
    for old in [name for name in arguments if name not in known]:
        value = arguments.pop(old)
        if old in RENAMED:
            _set(arguments, RENAMED[old], value, old)
        elif old in _SPECIAL:
            _SPECIAL[old](arguments, value)
        elif old in _WITHOUT_EFFECT:
            _warn(f"{old}={value!r} has no effect any more: {_WITHOUT_EFFECT[old]}")
        else:
            arguments[old] = value  # unknown: the constructor raises a TypeError with its name
    return arguments


def is_legacy(name: str) -> bool:
    """Whether `translate` knows `name` as an old one."""
    return name in RENAMED or name in _SPECIAL or name in _WITHOUT_EFFECT


def todays_name(old: str) -> str:
    """What to do instead of setting an old name."""
    if old in _WITHOUT_EFFECT:
        return _WITHOUT_EFFECT[old]
    return f"it is {RENAMED[old]} now" if old in RENAMED else "pass it to ORPOConfig"


def _set(arguments: dict[str, Any], new: str, value: Any, old: str) -> None:
    if new in arguments:
        raise ConfigError(f"{old}={value!r} and {new}={arguments[new]!r} are the same option: pass {new} alone")
    arguments[new] = value
    _warn(f"{old} is now {new}: {new}={value!r} is used")


def _warmup_ratio(arguments: dict[str, Any], value: float) -> None:
    # transformers 5 reads a warmup_steps below 1 as a share of all steps, which warmup_ratio was.
    if value and "warmup_steps" not in arguments:
        _set(arguments, "warmup_steps", value, "warmup_ratio")


def _group_by_length(arguments: dict[str, Any], value: bool) -> None:
    if value:
        _set(arguments, "train_sampling_strategy", "group_by_length", "group_by_length")


def _label_pad_token_id(arguments: dict[str, Any], value: int) -> None:
    if value != -100:
        raise ConfigError(f"label_pad_token_id={value} is not supported: ignored labels are always -100, leave it out")
    _warn("label_pad_token_id has no effect any more: ignored labels are always -100")


_SPECIAL: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _group_by_length,
    "label_pad_token_id": _label_pad_token_id,
}


def _warn(message: str) -> None:
    # The warning shows the line of the program that passed the argument, not a line of this package.
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("orpo_plugins."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FutureWarning, stacklevel=level)
