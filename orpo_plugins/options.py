"""Every option with its values, its default and a sentence on what it does.

`ORPOConfig` inherits the fields, and Axolotl's keys are made from them.  The collator and `orpo_forward` take the
frozen dataclasses.  All values are checked here.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from orpo_plugins.errors import ConfigError
from orpo_plugins.hooks import plugins
from orpo_plugins.objective import check_coefficients

NLLOver = Literal["sequence", "completion"]
NLLNormalization = Literal["batch", "microbatch", "pair"]
StepStrategy = Literal["pairs", "tokens"]
TruncationMode = Literal["keep_end", "keep_start"]
TrainOn = Literal["all_assistant", "last"]
CHOICES: Mapping[str, tuple[str, ...]] = {
    "nll_over": get_args(NLLOver),
    "nll_normalization": get_args(NLLNormalization),
    "step_strategy": get_args(StepStrategy),
    "truncation_mode": get_args(TruncationMode),
    "train_on": get_args(TrainOn),
}
"""The options that have a fixed set of values."""


# ---- checks


def check_option(name: str, value: Any, *, label: str | None = None) -> None:
    """Raises `ConfigError` for a value that an option cannot have; `label` is the option's name in the message."""
    label = label or name
    if name in CHOICES and value not in CHOICES[name]:
        raise ConfigError(f"unknown {label} {value!r}; known: {', '.join(CHOICES[name])}")
    if name == "kernel" and value != "auto":
        plugins.known_kernel(value)
    if name == "layout" and value != "auto":
        plugins.layout(value)
    if name == "odds_temperature":
        check_coefficients(0.0, value)
    if name == "loss_terms":
        for term in value:
            plugins.loss_term(term)


def check_batch_options(max_tokens_per_batch: int | None, step_strategy: str) -> None:
    """Raises `ConfigError` for a value that is unknown or out of range."""
    check_option("step_strategy", step_strategy)
    if max_tokens_per_batch is None and step_strategy == "tokens":
        raise ConfigError("step_strategy='tokens' fills batches up to max_tokens_per_batch, which is None: set it")
    limit = 1 if max_tokens_per_batch is None else max_tokens_per_batch
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"max_tokens_per_batch is {limit!r}: it must be None or a whole number of at least 1")


def did_you_mean(name: str, known: Iterable[str], *, form: str = "; did you mean {!r}?") -> str:
    """A question in the given form about the known name that is most similar to `name`; "" where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return form.format(close[0]) if close else ""


# ---- what each part of the package takes


@dataclass(frozen=True, kw_only=True)
class ORPOOptions:
    """What defines the loss."""

    beta: float = 0.1
    """The paper's lambda: weight of the odds-ratio term."""
    odds_temperature: float = 1.0
    """Multiplies the log odds ratio inside the sigmoid."""
    nll_normalization: NLLNormalization = "batch"
    """"batch" or "microbatch": mean over tokens; "pair": mean per answer, then over pairs."""
    loss_terms: Mapping[str, float] = field(default_factory=dict)
    """Per-pair terms of plugins to add, {name: weight}."""
    kernel: str = "auto"
    """What computes the head: "auto", "reference", "chunked", "chunked_fp32", "triton" or a plugin's kernel."""
    memory_budget: int | None = None
    """Bytes that a kernel may hold beyond inputs and gradients; None leaves it to the kernel."""
    logit_means: bool = False
    """Whether `metrics` has the mean logits of chosen and rejected rows (TRL's logits/chosen, logits/rejected)."""

    def __post_init__(self) -> None:
        check_coefficients(self.beta, self.odds_temperature)
        for name in ("nll_normalization", "loss_terms", "kernel"):
            check_option(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How long a pair may be, in tokens with BOS and EOS counted.

    The prompt of a pair that is too long is cut first, until the longer answer fits, or half of `max_length` is left
    for the answers.  Then each answer that is still too long is cut at its end.

    With an encoder, prompt and answer have separate limits: each may be `max_length` tokens long, or as long as
    `max_prompt_length` and `max_completion_length` say.  Special tokens at both ends stay.

    Raises:
        ConfigError: a length below its minimum, lengths that contradict each other, an unknown mode.
    """

    max_length: int | None = 1024
    """Prompt and answer together; None: no limit."""
    max_prompt_length: int | None = None
    """The prompt; None: whatever `max_length` leaves."""
    max_completion_length: int | None = None
    """Each answer; None: whatever `max_length` leaves."""
    truncation_mode: TruncationMode = "keep_end"
    """Which end of a prompt that is too long stays: "keep_end" or "keep_start".  BOS always stays."""
    encoder_decoder: bool = False
    """Whether an encoder reads the prompts (see `layouts/encoder_decoder.py`)."""
    sft_rows: bool = False
    """Whether a row may have no rejected answer: such rows are trained only with the NLL."""
    train_on: TrainOn = "all_assistant"
    """Which assistant turns are the answer, where the two conversations differ in several: "all_assistant", or "last".
    With "last" everything before the last turn is the prompt.  Turns that both have in common always are."""
    template_strings: bool = False
    """Whether the chat template is applied to rows of strings: the prompt as a message of the user, each answer as one
    of the assistant.  Strings that have the template already stay as they are."""
    repeat_eos: bool = False
    """Whether an answer ends as in TRL: with what the chat template writes after EOS (a newline in ChatML), and a
    second EOS.  The model is certain of both, which raises the mean log-probability of short answers the most."""

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_prompt_length", 1), ("max_completion_length", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} is {value!r}: it must be None or a whole number of at least {least}")
        check_option("truncation_mode", self.truncation_mode)
        check_option("train_on", self.train_on)
        shared = self.max_length is not None and not self.encoder_decoder
        if shared and (self.max_prompt_length or 0) >= (self.max_length or 0):
            raise ConfigError(
                f"max_prompt_length {self.max_prompt_length} leaves no room for an answer in max_length "
                f"{self.max_length}: lower it, or raise max_length"
            )


# ---- the arguments of trainers


@dataclass
class ORPOOwnFields:
    """The options that TRL's arguments do not have; Axolotl's arguments have both."""

    kernel: str = field(
        default="auto",
        metadata={"help": "What computes the head: auto, reference, chunked, chunked_fp32, triton, or a plugin's."},
    )
    layout: str = field(
        default="auto", metadata={"help": "How pairs are laid out: auto, padded, packed, shared, or a plugin's."}
    )
    layout_check: bool = field(
        default=True, metadata={"help": "Compare the layout with padded on two pairs before training."}
    )
    show_example: bool = field(
        default=True, metadata={"help": "Log one pair as text before training: prompt, answers, what is labelled."}
    )
    nll_over: NLLOver = field(
        default="sequence",
        metadata={"help": "NLL over prompt and chosen answer (sequence) or only the chosen answer (completion)."},
    )
    nll_normalization: NLLNormalization = field(
        default="batch",
        metadata={
            "help": "Token mean over the whole optimizer step (batch), token mean per micro-batch as TRL "
            "(microbatch), or mean per answer, then over pairs (pair)."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a training batch on one device, counted as in its layout; None: batches are cut "
            "only by pairs."
        },
    )
    step_strategy: StepStrategy = field(
        default="pairs",
        metadata={
            "help": "With max_tokens_per_batch: every optimizer step has the same number of pairs, in batches of "
            "similar numbers of tokens (pairs), or every batch has as many tokens as fit (tokens)."
        },
    )
    odds_temperature: float = field(
        default=1.0, metadata={"help": "Multiplies the log odds ratio inside the sigmoid. Alias: orpo_beta."}
    )
    loss_terms: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Per-pair terms of plugins to add, as {name: weight}."}
    )
    memory_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes that the head may use in addition to inputs and gradients; None: automatic."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, in tokens; None: what max_length leaves."}
    )
    truncation_mode: TruncationMode = field(
        default="keep_end",
        metadata={"help": "Which part of a prompt that is too long is kept: keep_end or keep_start."},
    )
    sft_rows: bool = field(
        default=False,
        metadata={"help": "Whether rows may have no rejected answer; such rows are trained only with the NLL."},
    )
    train_on: TrainOn = field(
        default="all_assistant",
        metadata={"help": "Which assistant turns of an answer of several turns are trained: all_assistant or last."},
    )
    template_strings: bool = field(
        default=False,
        metadata={
            "help": "Apply the chat template to rows of strings: the prompt as the user's, answers as the model's."
        },
    )
    repeat_eos: bool = field(
        default=False,
        metadata={
            "help": "End each answer with what the chat template writes behind EOS and a second EOS, as TRL does."
        },
    )

    def options(self) -> ORPOOptions:
        """The options that define the loss.  Raises `ConfigError` for a value out of range."""
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
        for name in (*CHOICES, "layout"):
            check_option(name, getattr(self, name))


@dataclass
class ORPOFields(ORPOOwnFields):
    """All fields that ORPO adds to `TrainingArguments`."""

    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt plus answer, in tokens; None: no limit."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest answer, in tokens; None: what max_length leaves."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Weight of the odds-ratio term, the paper's lambda. Alias: orpo_alpha."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set the base model's dropout to 0. Adapters keep the dropout of their config."},
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
