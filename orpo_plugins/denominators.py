"""Denominators of the loss: the numbers of tokens and pairs of a micro-batch, or of a whole optimizer step.

for step in steps:                               # gradient accumulation, in a loop of your own
    totals = step_totals(step)
    for batch in step:
        orpo_forward(model, batch, totals=totals).loss.backward()
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orpo_plugins.targets import Targets, targets_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Denominators:
    """What the sums of one micro-batch are divided by.  As tensors, they cause no wait for the device."""

    nll_tokens: Tensor | float
    """NLL tokens of the whole optimizer step, all micro-batches and ranks, divided by the number of ranks."""
    num_pairs: Tensor | float
    """Pairs with a rejected answer, counted in the same way."""
    num_examples: Tensor | float
    """All pairs, with or without a rejected answer, counted in the same way."""

    @classmethod
    def of(cls, counts: Tensor) -> "Denominators":
        """From the sum of `counts_of` over micro-batches.  A count of 0 becomes 1, which divides sums of nothing."""
        tokens, pairs, examples = torch.where(counts > 0, counts, 1.0).unbind()
        return cls(nll_tokens=tokens, num_pairs=pairs, num_examples=examples)


def counts_of(targets: Targets) -> Tensor:
    """fp32 [3]: NLL tokens, pairs with a rejected answer, and all pairs of one micro-batch, each times its weight."""
    in_nll = targets.in_nll.float()
    tokens = in_nll if targets.weights is None else in_nll * targets.weights
    weights = targets.pair_weights()
    paired = targets.answer_lengths()[targets.num_pairs :] > 0
    return torch.stack([tokens.sum(), (weights * paired).sum(), weights.sum()])


def step_totals(batches: Iterable[Mapping[str, Any]], reduce: Callable[[Tensor], Tensor] | None = None) -> Denominators:
    """The denominators of an optimizer step: its loss then does not depend on how it is cut into micro-batches.

    Args:
        batches: all micro-batches of the step on this rank, from `ORPOCollator`.
        reduce: with several ranks, a function that gives the mean of a tensor over them.  The mean and not the sum,
            because averaging the gradients divides by the number of ranks once more.  With Accelerate:
            `lambda counts: accelerator.reduce(counts, reduction="mean")`.

    Returns:
        The argument `totals` of `orpo_forward`, for each of these batches.
    """
    counts = torch.stack([counts_of(targets_of(batch)) for batch in batches]).sum(0)
    return Denominators.of(counts if reduce is None else reduce(counts))


def own_denominators(targets: Targets) -> Denominators:
    """The counts of one micro-batch by itself."""
    return Denominators.of(counts_of(targets))
