"""A third-party plugin with one part of every kind: orpo-plugins finds this module through its entry point."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from orpo_plugins import errors, hooks
from orpo_plugins.kernels.reference import reference_head
from orpo_plugins.layouts.padded import Padded, widened

# ---- a row format, recognised by its columns


@hooks.hookimpl
def orpo_row_formats() -> list[hooks.RowFormat]:
    """Rows of a quiz: question, good, bad."""
    return [hooks.RowFormat(name="quiz", columns="question, good, bad (strings)", matches=is_quiz, parse=parse_quiz)]


def is_quiz(row: Mapping[str, Any]) -> bool:
    """No built-in format has these columns."""
    return {"question", "good", "bad"} <= set(row)


def parse_quiz(row: Mapping[str, Any]) -> hooks.Preference:
    """Every prompt ends with a question mark."""
    if not row["question"].strip():
        raise errors.RowError("column 'question' is empty: drop the row")
    return hooks.Preference(prompt=row["question"] + "? ", chosen=row["good"], rejected=row["bad"])


# ---- a layout, for `layout: few_widths`


@hooks.hookimpl
def orpo_layouts() -> list[hooks.Layout]:
    """Rows as wide as the next power of two: few shapes for torch.compile."""
    return [FewWidths()]


class FewWidths(Padded):
    """*padded*, with more padding."""

    name = "few_widths"

    def collate(self, pairs: Sequence[hooks.Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
        """That of *padded*, widened."""
        batch = super().collate(pairs, pad_token_id=pad_token_id, nll_over=nll_over)
        width = batch["input_ids"].shape[1]
        return widened(batch, 2 ** (width - 1).bit_length(), pad_token_id)


# ---- a kernel, for `kernel: double`


@hooks.hookimpl
def orpo_kernels() -> list[hooks.Kernel]:
    """The reference in float64: slow, and as exact as it gets."""
    return [hooks.Kernel(name="double", compute=double_head, unsupported=has_no_float64, priority=-200)]


def double_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: hooks.Targets,
    objective: hooks.Objective,
    options: hooks.HeadOptions,
) -> hooks.HeadResult:
    """Autograd carries the gradients back to the dtype of the inputs."""
    bias = None if bias is None else bias.double()
    return reference_head(hidden.double(), weight.double(), bias, targets, objective, options)


def has_no_float64(hidden: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot run on these tensors."""
    return "MPS devices have no float64" if hidden.device.type == "mps" else None


# ---- a loss term, for `loss_terms: {simpo: 0.5}`


@hooks.hookimpl
def orpo_loss_terms() -> list[hooks.LossTerm]:
    """A margin loss without a reference model (Meng, Xia and Chen 2024)."""
    return [hooks.LossTerm(name="simpo", compute=simpo)]


def simpo(pairs: hooks.PairLogps) -> Tensor:
    """-log sigmoid(2 * (chosen - rejected) - 1), on mean log-probabilities; [B]."""
    return -F.logsigmoid(2.0 * (pairs.chosen - pairs.rejected) - 1.0)


# ---- a metric, in every log


@hooks.hookimpl
def orpo_metrics() -> list[hooks.Metric]:
    """How much longer the chosen answers are."""
    return [hooks.Metric(name="length_gap", compute=length_gap)]


def length_gap(output: hooks.ORPOOutput) -> Tensor:
    """Tokens; [B]."""
    return output.metrics["chosen_lengths"] - output.metrics["rejected_lengths"]
