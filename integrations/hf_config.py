"""`ORPOConfig`: transformers' `TrainingArguments` with the options of ORPO.  It does not depend on TRL.

ORPOConfig(output_dir="out", beta=0.1, max_length=1024, kernel="auto", layout="auto")
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from orpo_plugins.errors import ConfigError
from orpo_plugins.integrations.hf_legacy_arguments import is_legacy, todays_name, translate
from orpo_plugins.options import ORPOFields, did_you_mean

# transformers 5.18 and later call gradient checkpointing activation checkpointing, and keep the old name as an alias.
_HAS_NEW_NAME = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
_CHECKPOINTING = {"help": "Recompute activations in the backward pass: less memory, about a fifth slower."}


@dataclass
class _ORPOArguments(ORPOFields, TrainingArguments):
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "loss_terms"]  # noqa: RUF012

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1: as a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave NaN and infinite losses out of the log; waits for the device at each micro-batch."},
    )
    if _HAS_NEW_NAME:
        activation_checkpointing: bool | None = field(default=True, metadata=_CHECKPOINTING)
    else:
        gradient_checkpointing: bool = field(default=True, metadata=_CHECKPOINTING)
    bf16: bool | None = field(  # type: ignore[assignment]  # None until __post_init__ chooses
        default=None, metadata={"help": "bf16 mixed precision; None: where the accelerator has it, unless fp16 is set."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers has no types there
        self.check()


class ORPOConfig(_ORPOArguments):
    """Arguments of `ORPOTrainer`: all of `TrainingArguments`, and the fields of `ORPOFields`.

    Defaults that differ from `TrainingArguments`, as in TRL: `learning_rate` 1e-6, `logging_steps` 10, gradient
    (activation) checkpointing on, `bf16` on where the accelerator supports it and `fp16` is not set.  Unlike TRL's,
    `logging_nan_inf_filter` is off: a loss that is not finite ends the run with an error at the next log.

    Names that TRL and transformers have dropped are accepted and translated, with a warning each:
    `orpo_alpha`, `orpo_beta`, `evaluation_strategy`, `warmup_ratio`, `group_by_length`, `no_cuda`,
    `label_pad_token_id`, `overwrite_output_dir`, `save_safetensors`, `logging_dir`, `is_encoder_decoder`.

    Raises:
        ConfigError: an option that is unknown or out of range.
        TypeError: a name that no version ever had.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = frozenset(f.name for f in dataclasses.fields(_ORPOArguments) if f.init)
        arguments = translate(kwargs, known)
        for name in arguments.keys() - known:
            raise TypeError(f"ORPOConfig has no option {name!r}{did_you_mean(name, known)}")
        if _HAS_NEW_NAME:
            _rename_checkpointing(arguments)
        super().__init__(*args, **arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises `ConfigError` for an old name: only the constructor translates these."""
        if is_legacy(name) and name not in self.__dataclass_fields__:
            raise ConfigError(f"{name}={value!r} would have no effect: {todays_name(name)}")
        super().__setattr__(name, value)


def _rename_checkpointing(arguments: dict[str, Any]) -> None:
    """Replaces old names by new ones.

    transformers reads an old name only where the new one is not set.  Ours is always set: its default is True.
    """
    wanted = arguments.pop("gradient_checkpointing", None)
    if wanted is not None:
        # A command line gives both names, one with the default; a copy of the arguments has both as well.
        arguments["activation_checkpointing"] = wanted and arguments.get("activation_checkpointing", True)
    options = arguments.pop("gradient_checkpointing_kwargs", None)
    if options is not None and arguments.get("activation_checkpointing_kwargs") is None:
        arguments["activation_checkpointing_kwargs"] = options
