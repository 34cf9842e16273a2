"""The YAML keys that the plugin adds to Axolotl's config, and how they become training arguments.

orpo_kernel: chunked          # -> AxolotlORPOConfig.kernel
orpo_nll_normalization: pair  # -> AxolotlORPOConfig.nll_normalization
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationInfo, create_model, field_validator

from orpo_plugins.errors import ConfigError
from orpo_plugins.objective import check_coefficients
from orpo_plugins.options import CHOICES, ORPOFields, ORPOOwnFields, check_option, did_you_mean

AXOLOTL_KEYS = ("orpo_alpha",)
"""Keys beginning with `orpo_` that Axolotl itself has."""
_NAMES = {*(option.name for option in dataclasses.fields(ORPOOwnFields)), "max_completion_length"}
"""The options that have a key of ours; Axolotl has keys for the others."""
_COLUMNS = Field(default=None, description="Filled in by the plugin from the datasets' field_* keys; not for users.")


class _Checked(BaseModel):
    @field_validator("*", check_fields=False)
    @classmethod
    def _is_known(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            check_option(str(info.field_name).removeprefix("orpo_"), value, label=info.field_name)
        return value


def _key(option: dataclasses.Field[Any]) -> tuple[Any, Any]:
    """The type and the description of an option's key: absent, it leaves the trainer's default."""
    kind: Any = dict[str, float] if option.name == "loss_terms" else option.type
    if option.name in CHOICES:
        kind = str  # `check_option` lists the values
    least = 0 if option.type == int | None else None
    return kind | None, Field(default=None, gt=least, description=str(option.metadata["help"]))


_FIELDS: dict[str, Any] = {
    **{f"orpo_{option.name}": _key(option) for option in dataclasses.fields(ORPOFields) if option.name in _NAMES},
    "orpo_columns": (dict[str, list[dict[str, str]]] | None, _COLUMNS),
}
ORPOInputArgs: type[BaseModel] = create_model("ORPOInputArgs", __base__=_Checked, **_FIELDS)
"""Mixed into Axolotl's config schema; every key is optional."""
KEYS = tuple(name for name in ORPOInputArgs.model_fields if name != "orpo_columns")
"""The YAML keys, for messages."""


def check_keys(keys: Iterable[str]) -> None:
    """Raises `ConfigError` for a key beginning with `orpo_` that does not exist: Axolotl drops such keys silently."""
    known = (*AXOLOTL_KEYS, *ORPOInputArgs.model_fields)
    for key in keys:
        if key.startswith("orpo_") and key not in known:
            ours = (*AXOLOTL_KEYS, *KEYS)
            hint = did_you_mean(key, ours, form=" (did you mean {}?)")
            raise ConfigError(f"unknown YAML key {key!r}{hint}; known: {', '.join(ours)}")


def check_beta(cfg: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the three names that Axolotl has for beta disagree, or the value is out of range."""
    given = {
        "trl.beta": (cfg.get("trl") or {}).get("beta"),
        "rl_beta": cfg.get("rl_beta"),
        "orpo_alpha": cfg.get("orpo_alpha"),
    }
    betas = {name: _number(name, value) for name, value in given.items() if value is not None}
    if len(set(betas.values())) > 1:
        values = ", ".join(f"{name}: {value:g}" for name, value in betas.items())
        raise ConfigError(f"{values} are one option, the weight of the odds-ratio term: keep orpo_alpha alone")
    for name, beta in betas.items():
        try:
            check_coefficients(beta, 1.0)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def is_ours(cfg: Mapping[str, Any]) -> bool:
    """Whether a config trains with ORPO and has the plugin: once it is loaded, it is asked about every config."""
    return cfg.get("rl") == "orpo" and any(str(name).endswith("ORPOPlugin") for name in cfg.get("plugins") or [])


def add_training_arguments() -> None:
    """Gives our fields to `AxolotlORPOConfig`, and to the arguments of no other method.

    A plugin's `get_training_args_mixin` (0.19.0) would give them to all methods, whose fields of the same names have
    other defaults, and only if no run of the process, or import, has loaded Axolotl's arguments before.
    """
    from axolotl.core import training_args

    if issubclass(training_args.AxolotlORPOConfig, ORPOOwnFields):
        return

    @dataclass
    class AxolotlORPOConfig(ORPOOwnFields, training_args.AxolotlORPOConfig):  # type: ignore[misc]  # no types there
        """Axolotl's arguments for ORPO with the plugin's."""

    # By these names it is found again when saved arguments are loaded.
    AxolotlORPOConfig.__module__, AxolotlORPOConfig.__qualname__ = training_args.__name__, AxolotlORPOConfig.__name__
    training_args.AxolotlORPOConfig = AxolotlORPOConfig


def check_steps(cfg: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for batches filled up to no limit."""
    if cfg.get("orpo_step_strategy") == "tokens" and cfg.get("orpo_max_tokens_per_batch") is None:
        raise ConfigError("orpo_step_strategy: tokens fills batches up to orpo_max_tokens_per_batch: set that too")


def training_arguments(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `AxolotlORPOConfig` that come from our keys; absent keys leave the defaults.

    And from `group_by_length`, which Axolotl passes on to other trainers only.
    """
    names = {key: key.removeprefix("orpo_") for key in KEYS}
    arguments = {name: cfg.get(key) for key, name in names.items() if cfg.get(key) is not None}
    return {**arguments, "train_sampling_strategy": "group_by_length"} if cfg.get("group_by_length") else arguments


def _number(name: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-1 as a string
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}: it must be a number") from None
