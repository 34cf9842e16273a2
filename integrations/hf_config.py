"""`ORPOConfig`: transformers' `TrainingArguments` plus what ORPO needs; no TRL class is involved.

ORPOConfig(output_dir="out", beta=0.1, max_length=1024, kernel="auto", layout="auto")
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from orpo_plugins.errors import ConfigError
from orpo_plugins.forward import NLL_OVER, ORPOOptions
from orpo_plugins.hooks import plugins
from orpo_plugins.integrations.hf_legacy_arguments import is_legacy, todays_name, translate
from orpo_plugins.layouts.batches import check_batch_options

# transformers 5.18 and later call gradient checkpointing activation checkpointing, and keep the old name as an alias.
_HAS_NEW_NAME = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
_CHECKPOINTING = {"help": "Recompute activations in the backward pass: less memory, about a fifth slower."}


@dataclass
class ORPOOwnFields:
    """What no other framework's arguments have; Axolotl's mix it in beside TRL's fields."""

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, in tokens; None: whatever max_length leaves."}
    )
    truncation_mode: str = field(
        default="keep_end", metadata={"help": "Which part of a prompt that is too long stays: keep_end or keep_start."}
    )
    train_on: str = field(
        default="all_assistant",
        metadata={"help": "Which assistant turns of an answer of several turns are trained: all_assistant or last."},
    )
    sft_rows: bool = field(
        default=False,
        metadata={"help": "Whether rows may have no rejected answer; such rows are trained with the NLL alone."},
    )
    template_strings: bool = field(
        default=False,
        metadata={
            "help": "Apply the chat template to rows of strings: the prompt as the user's, answers as the model's."
        },
    )
    odds_temperature: float = field(
        default=1.0, metadata={"help": "Multiplies the log odds ratio inside the sigmoid. Alias: orpo_beta."}
    )
    kernel: str = field(
        default="auto",
        metadata={"help": "Who computes the head: auto, reference, chunked, chunked_fp32, triton, or a plugin's."},
    )
    layout: str = field(
        default="auto", metadata={"help": "How pairs are laid out: auto, padded, packed, shared, or a plugin's."}
    )
    nll_over: str = field(
        default="sequence",
        metadata={"help": "NLL over prompt and chosen answer (sequence) or the chosen answer alone (completion)."},
    )
    nll_normalization: str = field(
        default="batch",
        metadata={
            "help": "Token mean over the whole optimizer step (batch), token mean per micro-batch as TRL "
            "(microbatch), or mean per answer, then over pairs (pair)."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a training batch on one device, counted as the layout computes them; "
            "None: batches are cut by pairs alone."
        },
    )
    step_strategy: str = field(
        default="pairs",
        metadata={
            "help": "What max_tokens_per_batch keeps: every optimizer step's number of pairs, with its batches cut as "
            "evenly in tokens as possible (pairs), or batches as full as they get (tokens)."
        },
    )
    layout_check: bool = field(
        default=True, metadata={"help": "Compare the layout with padded on two pairs before training."}
    )
    show_example: bool = field(
        default=True, metadata={"help": "Log one pair as text before training: prompt, answers, what is labelled."}
    )
    loss_terms: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Per-pair terms of plugins to add, as {name: weight}."}
    )
    memory_budget: int | None = field(
        default=None, metadata={"help": "Bytes that the head may hold beyond inputs and gradients; None: automatic."}
    )

    def options(self) -> ORPOOptions:
        """The part that defines the loss; raises `ConfigError` for a value out of range."""
        return ORPOOptions(
            beta=self.beta,  # type: ignore[attr-defined]  # TRL's arguments have it too, so it is not among our own
            odds_temperature=self.odds_temperature,
            nll_normalization=self.nll_normalization,
            loss_terms=dict(self.loss_terms or {}),  # type: ignore[arg-type]  # a string was parsed by TrainingArguments
            kernel=self.kernel,
            memory_budget=self.memory_budget,
            logit_means=True,
        )

    def check(self) -> None:
        """Raises `ConfigError` for an option that is unknown or out of range, before anything is loaded."""
        self.options()
        check_batch_options(self.max_tokens_per_batch, self.step_strategy)
        if self.nll_over not in NLL_OVER:
            raise ConfigError(f"unknown nll_over {self.nll_over!r}; known: {NLL_OVER}")
        if self.layout != "auto":
            plugins.layout(self.layout)


@dataclass
class ORPOFields(ORPOOwnFields):
    """All fields that ORPO adds to `TrainingArguments`."""

    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt plus answer, in tokens; None: no limit."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest answer, in tokens; None: whatever max_length leaves."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Weight of the odds-ratio term, the paper's lambda. Alias: orpo_alpha."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set the base model's dropout to 0. Dropout of adapters stays as their config says."},
    )
    padding_value: int | None = field(
        default=None, metadata={"help": "Token id to pad with; None: the tokenizer's pad token."}
    )
    generate_during_eval: bool = field(
        default=False, metadata={"help": "Generate from the prompts of one batch at each evaluation and log a table."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, for a model given as a string."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that ship Python code."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})


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
    bf16: bool | None = field(
        default=None, metadata={"help": "bf16 mixed precision; None: where the accelerator has it, unless fp16 is set."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        self.check()


class ORPOConfig(_ORPOArguments):
    """Arguments of `ORPOTrainer`: all of `TrainingArguments`, and the fields of `ORPOFields`.

    Defaults that differ from `TrainingArguments`, as in TRL: `learning_rate` 1e-6, `logging_steps` 10, gradient
    (activation) checkpointing on, `bf16` on where the accelerator supports it and `fp16` is not set.  Unlike TRL's,
    `logging_nan_inf_filter` is off: a loss that is not finite ends the run with an error at the next log.

    Names that TRL and transformers have dropped are accepted, translated and named once in a warning:
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
            close = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"ORPOConfig has no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if _HAS_NEW_NAME:
            _rename_checkpointing(arguments)
        super().__init__(*args, **arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises `ConfigError` for an old name, which is translated in the constructor alone."""
        if is_legacy(name) and name not in self.__dataclass_fields__:
            raise ConfigError(f"{name}={value!r} would have no effect: {todays_name(name)}")
        super().__setattr__(name, value)


def _rename_checkpointing(arguments: dict[str, Any]) -> None:
    """Old names to new: transformers reads an old one only where the new is unset, which a default of True never is."""
    wanted = arguments.pop("gradient_checkpointing", None)
    if wanted is not None:
        # Both come from a command line (the default and what was given) or from a copy (the change and the mirror).
        arguments["activation_checkpointing"] = wanted and arguments.get("activation_checkpointing", True)
    options = arguments.pop("gradient_checkpointing_kwargs", None)
    if options is not None and arguments.get("activation_checkpointing_kwargs") is None:
        arguments["activation_checkpointing_kwargs"] = options
