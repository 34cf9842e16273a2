"""A third-party plugin: everything here is found through the entry point, with no change to orpo-plugins."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from orpo_plugins.hooks import (
    HeadOptions,
    HeadResult,
    Kernel,
    LossTerm,
    Metric,
    Objective,
    ORPOOutput,
    PairLogps,
    Preference,
    RowFormat,
    Targets,
    hookimpl,
)
from orpo_plugins.kernels.reference import reference_head


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """`kernel: double`, the reference in float64: slow, and as exact as it gets."""
    return [Kernel(name="double", compute=double_head, priority=-200)]


def double_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    objective: Objective,
    options: HeadOptions,
) -> HeadResult:
    """Autograd carries the gradients back to the inputs' own dtype."""
    bias = None if bias is None else bias.double()
    return reference_head(hidden.double(), weight.double(), bias, targets, objective, options)


@hookimpl
def orpo_row_formats() -> list[RowFormat]:
    """Rows of a quiz: question, good, bad."""
    return [RowFormat(name="quiz", columns="question, good, bad (strings)", matches=is_quiz, parse=parse_quiz)]


def is_quiz(row: Mapping[str, Any]) -> bool:
    """By its columns alone: no built-in format has them."""
    return {"question", "good", "bad"} <= set(row)


def parse_quiz(row: Mapping[str, Any]) -> Preference:
    """A question mark ends every prompt."""
    return Preference(prompt=row["question"] + "? ", chosen=row["good"], rejected=row["bad"])


@hookimpl
def orpo_loss_terms() -> list[LossTerm]:
    """`loss_terms: {simpo: 0.5}` adds a reference-free margin loss (Meng, Xia and Chen 2024)."""
    return [LossTerm(name="simpo", compute=simpo)]


def simpo(pairs: PairLogps) -> Tensor:
    """-log sigmoid(2 * (chosen - rejected) - 1), on mean log-probabilities."""
    return -F.logsigmoid(2.0 * (pairs.chosen - pairs.rejected) - 1.0)


@hookimpl
def orpo_metrics() -> list[Metric]:
    """How much longer the chosen answers are."""
    return [Metric(name="length_gap", compute=length_gap)]


def length_gap(output: ORPOOutput) -> Tensor:
    """[B] tokens."""
    return output.metrics["chosen_lengths"] - output.metrics["rejected_lengths"]
