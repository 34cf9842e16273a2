"""The YAML keys that the plugin adds to an Axolotl config, and how they become training arguments.

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
"""Axolotl's own keys that begin with `orpo_`."""
_NAMES = {*(option.name for option in dataclasses.fields(ORPOOwnFields)), "max_completion_length"}
"""The options that the plugin adds a key for; Axolotl has keys for the others."""
_COLUMNS = Field(default=None, description="Filled in by the plugin from the datasets' field_* keys; not for users.")


class _Checked(BaseModel):
    @field_validator("*", check_fields=False)
    @classmethod
    def _is_known(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            check_option(str(info.field_name).removeprefix("orpo_"), value, label=info.field_name)
        return value


def _key(option: dataclasses.Field[Any]) -> tuple[Any, Any]:
    """The type and the field of an option's key.  Without the key the trainer's default holds."""
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
"""Added to Axolotl's config schema; every key is optional."""
KEYS = tuple(name for name in ORPOInputArgs.model_fields if name != "orpo_columns")
"""The YAML keys, for messages."""


def check_keys(keys: Iterable[str]) -> None:
    """Raises `ConfigError` for an unknown key that begins with `orpo_`, which Axolotl would drop silently."""
    known = (*AXOLOTL_KEYS, *ORPOInputArgs.model_fields)
    for key in keys:
        if key.startswith("orpo_") and key not in known:
            ours = (*AXOLOTL_KEYS, *KEYS)
            hint = did_you_mean(key, ours, form=" (did you mean {}?)")
            raise ConfigError(f"unknown YAML key {key!r}{hint}; known: {', '.join(ours)}")


def check_beta(cfg: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where Axolotl's three keys for beta disagree, or a value is out of range."""
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
    """Whether a config has `rl: orpo` and the plugin.  A plugin that is loaded gets every config of the process."""
    return cfg.get("rl") == "orpo" and any(str(name).endswith("ORPOPlugin") for name in cfg.get("plugins") or [])


def add_training_arguments() -> None:
    """Adds our fields to `AxolotlORPOConfig`, and not to the arguments of other methods.

    A plugin's `get_training_args_mixin` (0.19.0) would add them to all methods, some of which have fields of the same
    names with other defaults.  It would also do so only if nothing in the process has imported Axolotl's arguments yet.
    """
    from axolotl.core import training_args

    if issubclass(training_args.AxolotlORPOConfig, ORPOOwnFields):
        return

    @dataclass
    class AxolotlORPOConfig(ORPOOwnFields, training_args.AxolotlORPOConfig):
        """Axolotl's arguments for ORPO with the plugin's."""

    # Saved arguments are loaded by these names.
    AxolotlORPOConfig.__module__, AxolotlORPOConfig.__qualname__ = training_args.__name__, AxolotlORPOConfig.__name__
    training_args.AxolotlORPOConfig = AxolotlORPOConfig


def check_steps(cfg: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for batches that are filled by tokens without a limit."""
    if cfg.get("orpo_step_strategy") == "tokens" and cfg.get("orpo_max_tokens_per_batch") is None:
        raise ConfigError("orpo_step_strategy: tokens fills batches up to orpo_max_tokens_per_batch: set that too")


def training_arguments(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `AxolotlORPOConfig` that come from our keys; without a key the default holds.

    `group_by_length` is read here as well, because Axolotl passes it on to other trainers only.
    """
    names = {key: key.removeprefix("orpo_") for key in KEYS}
    arguments = {name: cfg.get(key) for key, name in names.items() if cfg.get(key) is not None}
    return {**arguments, "train_sampling_strategy": "group_by_length"} if cfg.get("group_by_length") else arguments


def _number(name: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-1 as a string
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}: it must be a number") from None
