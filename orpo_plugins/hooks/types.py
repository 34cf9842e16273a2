"""What a plugin implements, except layouts (`hooks/layout.py`): a row format, a head kernel, a metric, a method.

Everything built in is an instance of these same classes, registered through the same hooks (`hooks/specs.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
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
    """Whether a row (raw columns) is of this format, from the columns and the types of their values."""
    parse: Callable[[Mapping[str, Any]], Preference]
    """Reads a row; raises `RowError` for a value that does not fit."""


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


def always_supported(_: object) -> None:
    """`unsupported` of what runs everywhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """What a kernel differentiates: sum(nll_weights * NLL per target) + pair_loss(mean log-probabilities)."""

    nll_weights: Tensor
    """fp32 [N]: the weight of each target's negative log-probability in the loss; 0 where not `in_nll`."""
    pair_loss: Callable[[PairLogps], Tensor]
    """Differentiable; maps `PairLogps` to the scalar that is added to the NLL, normalization included."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How logits come from hidden states, and how much memory may go into them."""

    softcap: float | None = None
    """c of c * tanh(logits / c), applied after the scale."""
    logit_scale: float = 1.0
    """Multiplies hidden @ weight.T + bias."""
    memory_budget: int | None = None
    """Bytes that may be held beyond inputs and returned gradients; None leaves it to the kernel."""
    logit_means: bool = False
    """Whether `HeadResult.logit_means` is asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadResult:
    """What a kernel returns."""

    loss: Tensor
    """fp32 scalar, differentiable in hidden, weight and bias."""
    nll_loss: Tensor
    """fp32 scalar, detached: sum(nll_weights * NLL per target)."""
    logps: Tensor
    """fp32 [2B], detached: mean log-probability per sequence."""
    logit_means: Tensor | None = None
    """fp32 [N], detached: the mean over the vocabulary of each target's logits, where asked for."""


class KernelFunction(Protocol):
    """Computes an `Objective` from hidden states without the caller seeing logits."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        objective: Objective,
        options: HeadOptions,
    ) -> HeadResult:
        """`hidden` [M, H] has a row per position, of which `targets.positions` [N] says what to read for each target.

        `weight` is [V, H], `bias` [V].  What stands in rows that no target reads must not matter.
        """


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A named head kernel."""

    name: str
    compute: KernelFunction
    unsupported: Callable[[torch.device], str | None] = always_supported
    """Why the kernel cannot run on a device, in words; None where it can."""
    priority: int = 0
    """`kernel="auto"` takes the supported kernel with the highest."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure logged beside the built-in ones."""

    name: str
    compute: Callable[[ORPOOutput], Tensor]
    """[B] (or any shape): values whose mean over all pairs since the last log is reported."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method as a framework sees it, by import path so that announcing it imports nothing."""

    name: str
    """"orpo", as in `rl: orpo` and `orpo-plugins trl orpo`."""
    framework: str
    """"trl", "axolotl" or "transformers"."""
    trainer: str
    """"package.module.Class" of the trainer."""
    config: str
    """"package.module.Class" of its arguments."""
