"""Options that change after a trainer is built: by a callback, a search over hyperparameters, or an assignment.

Those of the loss are read where they are used, so a change holds from the next step.  Some others are applied when a
run begins.  What data or model were made with cannot change any more, and is an error.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from orpo_plugins.errors import ConfigError
from orpo_plugins.options import ORPOOptions

LOSS_OPTIONS = tuple(field.name for field in fields(ORPOOptions) if field.name != "logit_means")
"""Read at every step."""
RUN_OPTIONS = ("layout", "nll_over", "max_tokens_per_batch", "step_strategy", "layout_check", "show_example")
"""Applied when `train()` begins."""
FIXED_OPTIONS = {
    **dict.fromkeys(
        (
            "max_length",
            "max_prompt_length",
            "max_completion_length",
            "truncation_mode",
            "sft_rows",
            "train_on",
            "template_strings",
        ),
        "the rows were tokenized with the old value",
    ),
    "padding_value": "the collator was made with the old value",
    **dict.fromkeys(("disable_dropout", "model_init_kwargs", "trust_remote_code"), "the model was made with it"),
}
"""Read when the trainer is built; why a change cannot be followed."""


class Option:
    """An option of the loss, as an attribute of an object that has `ORPOOptions`.

    What is set goes to where the loss reads it, and is checked as at construction.
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else getattr(getattr(instance, self.holder), self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        options: ORPOOptions = getattr(instance, self.holder)
        setattr(instance, self.holder, replace(options, **{self.name: value}))


def values_at(args: Any) -> dict[str, Any]:
    """Those of `RUN_OPTIONS` and `FIXED_OPTIONS` that the arguments have, with their values now."""
    return {name: getattr(args, name) for name in (*RUN_OPTIONS, *FIXED_OPTIONS) if hasattr(args, name)}


def changed(before: Mapping[str, Any], args: Any, *, running: bool) -> dict[str, Any]:
    """The `RUN_OPTIONS` that are others than `before`, with their new values.

    Raises `ConfigError` for a change that cannot be followed: of `FIXED_OPTIONS`, and of any while a run goes on.
    """
    new = {name: value for name, value in values_at(args).items() if value != before.get(name, value)}
    for name, value in new.items():
        if name in FIXED_OPTIONS:
            raise cannot_change(name, value, before[name])
        if running:
            raise ConfigError(
                f"{name} was {before[name]!r} when the run began and is {value!r} now: it is applied when train() "
                "begins, so set it before, or end this run"
            )
    return new


def cannot_change(name: str, value: Any, before: Any) -> ConfigError:
    """The error for a new value of one of `FIXED_OPTIONS`."""
    return ConfigError(
        f"{name} was {before!r} when the trainer was built and is to be {value!r} now, but {FIXED_OPTIONS[name]}: "
        f"set it back, or build a new ORPOTrainer with {name}={value!r} in its arguments (in a search over "
        "hyperparameters too, one for each value)"
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed, in words: "beta=0.2 (was 0.1)"; empty where nothing did."""
    return ", ".join(f"{name}={value!r} (was {before[name]!r})" for name, value in now.items() if value != before[name])
