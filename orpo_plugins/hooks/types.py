"""What a plugin implements: a row format, a kernel, a metric.

Layouts are in `hooks/layout.py`, loss terms in `objective.py`.

Everything built in is an instance of these same classes, registered through the same hooks (`hooks/specs.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from orpo_plugins.objective import ORPOOutput, PairLogps
from orpo_plugins.targets import Targets

Message = dict[str, Any]
"""One chat message: `role`, `content` and whatever else the chat template reads."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One row, read but not yet tokenized: three strings, or three message lists."""

    prompt: str | list[Message]
    """What both answers follow; with messages, everything before the first message in which they differ."""
    chosen: str | list[Message]
    """The preferred continuation of the prompt."""
    rejected: str | list[Message] | None
    """The other continuation; None where there is none (see `PairOptions.sft_rows`)."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to the chat template: `tools`, `chat_template_kwargs`."""
    plain: "Preference | None" = None
    """The same in three strings, for rows that were written as strings: used where the tokenizer has no chat
    template, and where the strings turn out to be templated already."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A way in which datasets write preferences."""

    name: str
    columns: str
    """The columns in words, shown when no format fits: "prompt, chosen, rejected (strings)"."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a row is of this format, by its columns and the types of their values.  It must not change the row."""
    parse: Callable[[Mapping[str, Any]], Preference]
    """Reads a row that matches.

    Raises `orpo_plugins.errors.RowError` for a value that does not fit.  Its message names the column and the value,
    and gets the number of the row in front.
    """


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One tokenized sequence of a pair (prompt and answer)."""

    input_ids: list[int]
    labels: list[int]
    """The same length: the token where it belongs to the answer, -100 where it belongs to the prompt."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A tokenized preference: two whole sequences, each with its answer marked."""

    chosen: TokenSequence
    rejected: TokenSequence
    """No tokens at all where a row has no rejected answer: it is trained with the NLL alone."""
    weight: float = 1.0
    """How many such pairs this one counts for, in both terms of the loss and in all figures."""
    margin: float = 0.0
    """What its log odds, times the temperature, have to exceed."""


def always_supported(*_: object) -> None:
    """`unsupported` of what runs everywhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss that a kernel computes and differentiates.

        loss = -sum over targets t of nll_weights[t] * logp[t] + pair_loss(means)
        means[s] = mean of logp[t] over the targets t of sequence s that are `in_answer`

    `logp[t]` is the log-probability of `targets.token_ids[t]`, and `means` are handed over as `PairLogps`.
    """

    nll_weights: Tensor
    """fp32 [N]: what the NLL of each target weighs in the loss; 0 where it is not `in_nll`."""
    pair_loss: Callable[[PairLogps], Tensor]
    """From `PairLogps` to the scalar that is added to the NLL; differentiable, and already divided by all pairs."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How logits come from hidden states, and how much memory may go into them.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), without the tanh where softcap is None
    """

    softcap: float | None = None
    """The bound of the logits, applied after the scale; None for none."""
    logit_scale: float = 1.0
    """Multiplies hidden @ weight.T + bias."""
    memory_budget: int | None = None
    """Bytes that may be held beyond inputs and returned gradients; None leaves it to the kernel."""
    logit_means: bool = False
    """Whether `HeadResult.logit_means` is asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadResult:
    """What a kernel returns, in fp32 or fp64."""

    loss: Tensor
    """Scalar, differentiable in hidden, weight and bias."""
    nll_loss: Tensor
    """Scalar, detached: the first term of the loss, -sum(nll_weights * logp)."""
    logps: Tensor
    """[2B], detached: the mean log-probability of each answer, chosen ones first; 0 for an answer that is none."""
    logit_means: Tensor | None = None
    """[N], detached: the mean over the vocabulary of each target's logits, where it is asked for."""


class KernelFunction(Protocol):
    """Computes an `Objective` from hidden states, so that nobody else needs the logits."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        objective: Objective,
        options: HeadOptions,
    ) -> HeadResult:
        """The loss, with gradients for those of `hidden`, `weight` and `bias` that require one.

        Args:
            hidden: [M, H], one row per position.  What stands in rows that no target reads must not matter.
            weight: [V, H].
            bias: [V] or None.
            targets: which rows to read (`positions` [N]), which token each predicts (`token_ids` [N]), and for which
                sequence (`sequence_ids` [N]).
            objective: the loss.
            options: scale, soft-cap, memory.

        The three tensors are of one dtype, autocast's where it is on, and on one device.
        """


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A named way to compute the head."""

    name: str
    compute: KernelFunction
    unsupported: Callable[[Tensor, Tensor], str | None] = always_supported
    """Why the kernel cannot run on `hidden` [M, H] and `weight` [V, H], in words; None where it can.

    They are the tensors that `compute` would get, or stand-ins of the same dtype, device and shape (with another M)
    before there is a batch.  It may look at these three and at the class of a tensor, and at no number: that would wait
    for the device in every step.
    """
    priority: int = 0
    """`kernel="auto"` takes the supported kernel with the highest.  Built in: chunked 0, triton 10."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A value logged beside the built-in metrics."""

    name: str
    """The key in the log; in evaluation with `eval_` in front."""
    compute: Callable[[ORPOOutput], Tensor]
    """From the output of one batch to one number per pair, [B], on any device.

    What is logged is their mean over all pairs since the last log, by weight, without pairs that have no rejected
    answer.  A tensor of another shape counts each of its numbers once.
    """
