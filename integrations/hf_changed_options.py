"""Options that change after a trainer is built: by a callback, by a hyperparameter search, or by an assignment.

Options of the loss are read where they are used, so a change holds from the next step on.  Some other options are
applied when a run begins.  The rest was used to make the data or the model: changing it is an error.
"""

from dataclasses import fields, replace
from typing import Any, Generic, Self, TypeVar, overload

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
            "repeat_eos",
        ),
        "the rows were tokenized with the old value",
    ),
    "padding_value": "the collator was made with the old value",
    **dict.fromkeys(("disable_dropout", "model_init_kwargs", "trust_remote_code"), "the model was made with it"),
}
"""Read when the trainer is built.  Each value says why a change has no effect any more."""

ValueT = TypeVar("ValueT")


class Option(Generic[ValueT]):
    """An option of the loss, as an attribute of an object that holds an `ORPOOptions`.

    Reading gives the value in that `ORPOOptions`.  Setting replaces the `ORPOOptions`, which checks the new value.
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> ValueT: ...
    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        return self if instance is None else getattr(getattr(instance, self.holder), self.name)

    def __set__(self, instance: object, value: ValueT) -> None:
        options: ORPOOptions = getattr(instance, self.holder)
        new: dict[str, Any] = {self.name: value}
        setattr(instance, self.holder, replace(options, **new))


class OptionChanges:
    """Compares a trainer's options with those of its last run, and with those that its log has shown."""

    def __init__(self, args: object, options: ORPOOptions) -> None:
        self._applied = _values(args)
        self._logged = self._shown(options)

    def to_apply(self, args: object, *, running: bool) -> dict[str, Any]:
        """The `RUN_OPTIONS` that have changed since `applied` was called, with their new values.

        Raises `ConfigError` for a change of `FIXED_OPTIONS`, and for any change while a run goes on.
        """
        new = {name: value for name, value in _values(args).items() if value != self._applied.get(name, value)}
        for name, value in new.items():
            if name in FIXED_OPTIONS:
                raise cannot_change(name, value, self._applied[name])
            if running:
                raise ConfigError(
                    f"{name} was {self._applied[name]!r} when the run began and is {value!r} now: it is applied when "
                    "train() begins, so set it before, or end this run"
                )
        return new

    def applied(self, args: object) -> None:
        """Remembers the values of now as those of the run."""
        self._applied = _values(args)

    def to_log(self, options: ORPOOptions) -> str:
        """What has changed since the last call, in words: "beta=0.2 (was 0.1)"; empty where nothing did."""
        before, self._logged = self._logged, self._shown(options)
        changed = {name: value for name, value in self._logged.items() if value != before[name]}
        return ", ".join(f"{name}={value!r} (was {before[name]!r})" for name, value in changed.items())

    def _shown(self, options: ORPOOptions) -> dict[str, Any]:
        return {**{name: getattr(options, name) for name in LOSS_OPTIONS}, **self._applied}


def _values(args: object) -> dict[str, Any]:
    """The `RUN_OPTIONS` and `FIXED_OPTIONS` that the arguments have; a stock trainer's have none."""
    return {name: getattr(args, name) for name in (*RUN_OPTIONS, *FIXED_OPTIONS) if hasattr(args, name)}


def cannot_change(name: str, value: object, before: object) -> ConfigError:
    """The error for a new value of one of `FIXED_OPTIONS`."""
    return ConfigError(
        f"{name} was {before!r} when the trainer was built and is to be {value!r} now, but {FIXED_OPTIONS[name]}: "
        f"set it back, or build a new ORPOTrainer with {name}={value!r} in its arguments (in a search over "
        "hyperparameters too, one for each value)"
    )
