"""The YAML keys that the plugin adds to Axolotl's config, and how they become training arguments.

orpo_kernel: chunked          # -> AxolotlORPOConfig.kernel
orpo_nll_normalization: pair  # -> AxolotlORPOConfig.nll_normalization
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from orpo_plugins.data.pairs import TRAIN_ON, TRUNCATION_MODES
from orpo_plugins.errors import ConfigError
from orpo_plugins.forward import NLL_NORMALIZATIONS, NLL_OVER
from orpo_plugins.hooks import plugins
from orpo_plugins.layouts.batches import STEP_STRATEGIES
from orpo_plugins.objective import check_coefficients

AXOLOTL_KEYS = ("orpo_alpha",)
"""Keys beginning with `orpo_` that Axolotl itself has."""
CHOICES = {
    "orpo_nll_over": NLL_OVER,
    "orpo_nll_normalization": NLL_NORMALIZATIONS,
    "orpo_step_strategy": STEP_STRATEGIES,
    "orpo_truncation_mode": TRUNCATION_MODES,
    "orpo_train_on": TRAIN_ON,
}
"""The values of the keys that have a fixed set of them."""


class ORPOInputArgs(BaseModel):
    """Mixed into Axolotl's config schema; every key is optional, and an absent one leaves the trainer's default."""

    orpo_kernel: str | None = Field(
        default=None,
        description="Who computes the head: auto, reference, chunked, chunked_fp32, triton, or a plugin's name.",
    )
    orpo_layout: str | None = Field(
        default=None, description="How pairs are laid out: auto, padded, packed, shared, or a plugin's name."
    )
    orpo_layout_check: bool | None = Field(
        default=None, description="Whether the layout is compared with padded on two pairs before training (true)."
    )
    orpo_show_example: bool | None = Field(
        default=None, description="Whether one pair is logged as text before training (true)."
    )
    orpo_nll_over: str | None = Field(
        default=None, description="NLL over prompt and chosen answer (sequence) or the chosen answer (completion)."
    )
    orpo_nll_normalization: str | None = Field(
        default=None, description="batch: token mean per optimizer step; microbatch: as TRL; pair: mean per answer."
    )
    orpo_max_tokens_per_batch: int | None = Field(
        default=None, gt=0, description="Most tokens of a training batch, as the layout computes them."
    )
    orpo_step_strategy: str | None = Field(
        default=None,
        description="What orpo_max_tokens_per_batch keeps: each step's pairs (pairs), or full batches (tokens).",
    )
    orpo_odds_temperature: float | None = Field(
        default=None, description="Multiplies the log odds ratio inside the sigmoid; > 0."
    )
    orpo_loss_terms: dict[str, float] | None = Field(
        default=None, description="Per-pair terms of plugins to add, {name: weight}."
    )
    orpo_memory_budget: int | None = Field(
        default=None, gt=0, description="Bytes that the head may hold beyond inputs and gradients."
    )
    orpo_max_prompt_length: int | None = Field(default=None, gt=0, description="Longest prompt, in tokens.")
    orpo_max_completion_length: int | None = Field(default=None, gt=0, description="Longest answer, in tokens.")
    orpo_truncation_mode: str | None = Field(
        default=None, description="Which part of a prompt that is too long stays: keep_end or keep_start."
    )
    orpo_sft_rows: bool | None = Field(
        default=None, description="Whether rows may have no rejected answer; they are trained with the NLL alone."
    )
    orpo_train_on: str | None = Field(
        default=None, description="Which assistant turns of an answer of several are trained: all_assistant or last."
    )
    orpo_template_strings: bool | None = Field(
        default=None, description="Whether the chat template is applied to rows of strings, in every dataset."
    )
    orpo_columns: dict[str, list[dict[str, str]]] | None = Field(
        default=None, description="Filled in by the plugin from the datasets' field_* keys; not for users."
    )

    @field_validator("orpo_kernel")
    @classmethod
    def _kernel_is_known(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            plugins.known_kernel(value)
        return value

    @field_validator("orpo_layout")
    @classmethod
    def _layout_is_known(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            plugins.layout(value)
        return value

    @field_validator(*CHOICES)
    @classmethod
    def _choice_is_known(cls, value: str | None, info: ValidationInfo) -> str | None:
        known = CHOICES[str(info.field_name)]
        if value is not None and value not in known:
            raise ConfigError(f"unknown {info.field_name} {value!r}; known: {', '.join(known)}")
        return value

    @field_validator("orpo_odds_temperature")
    @classmethod
    def _odds_temperature_in_range(cls, value: float | None) -> float | None:
        if value is not None:
            check_coefficients(0.0, value)
        return value

    @field_validator("orpo_loss_terms")
    @classmethod
    def _loss_terms_are_known(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for name in value or {}:
            plugins.loss_term(name)
        return value


KEYS = tuple(name for name in ORPOInputArgs.model_fields if name != "orpo_columns")
"""The YAML keys, for messages."""


def check_keys(keys: Iterable[str]) -> None:
    """Raises `ConfigError` for a key beginning with `orpo_` that does not exist: Axolotl drops such keys silently."""
    known = (*AXOLOTL_KEYS, *ORPOInputArgs.model_fields)
    for key in keys:
        if key.startswith("orpo_") and key not in known:
            close = difflib.get_close_matches(key, (*AXOLOTL_KEYS, *KEYS), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"unknown YAML key {key!r}{hint}; known: {', '.join((*AXOLOTL_KEYS, *KEYS))}")


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

    from orpo_plugins.integrations.hf_config import ORPOOwnFields

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
