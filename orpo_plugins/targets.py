"""Targets: which position of the hidden states predicts which token, for which answer, in which term.

A layout decides where tokens stand in the forward pass.  Everything behind the forward pass reads this table only: it
is the interface between layouts and kernels.

In a batch the table is one int64 tensor of shape [N, 4], `labels`.  Each of its rows is a target:

    position      index into the hidden states, flattened to [positions, H]
    token_id      the token that is predicted there
    sequence_id   0..B-1 for chosen answers, B..2B-1 for rejected ones
    terms         a sum of IN_ANSWER: it counts in the sequence's mean log-probability;  IN_NLL: it counts in the NLL;
                  IN_DECODER: it is in a decoder that has an encoder;  WIDTH times the width of `input_ids`

A pair without a rejected answer has no targets there.  Where pairs have weights or margins, the table is [N, 5]: the
last column holds those of the target's pair, as two fp32 numbers in the bits of one int64.

Width, weights and margins are in the table and not under keys of their own for two reasons.  A Trainer gives a loss
function nothing of a batch but `labels`.  And Accelerate moves or cuts all tensors of a batch in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orpo_plugins.errors import BatchError

IN_ANSWER = 1
IN_NLL = 2
IN_DECODER = 4
WIDTH = 8
IGNORE_INDEX = -100
CUT = (
    "the batch has lost targets: something cuts its tensors along their first dimension, as Accelerate does with "
    "batches of streams. Set accelerator_config={'dispatch_batches': False}, or in a loop of your own "
    "Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))"
)
"""The error for a batch that comes incomplete from its data loader."""


def prompt_length(labels: Sequence[int]) -> int:
    """How many tokens come before the first one with a label."""
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def with_width(table: Tensor, width: int) -> Tensor:
    """The table with the number of columns of the batch's `input_ids` in its `terms`."""
    table = table.clone()
    table[:, 3] += WIDTH * width
    return table


def width_of(table: Tensor) -> int | None:
    """The width that `with_width` has written; None without it.  Waits for the device."""
    return int(table[0, 3]) // WIDTH or None if len(table) else None


def with_weights(table: Tensor, weights: Sequence[float], margins: Sequence[float]) -> Tensor:
    """The [N, 5] table that adds each pair's weight and margin ([B] numbers) to a [N, 4] one."""
    numbers = torch.tensor(list(zip(weights, margins, strict=True)), dtype=torch.float32).view(torch.int64)
    return torch.cat([table, numbers[table[:, 2] % len(weights)]], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """The table, unpacked.  All tensors are [N], on one device.  The targets of a pair follow each other."""

    positions: Tensor
    """int64: index into hidden states flattened to [positions, H]; it may occur twice (in shared prompts)."""
    token_ids: Tensor
    """int64: the token that is predicted there."""
    sequence_ids: Tensor
    """int64: 0..B-1 for chosen answers, B..2B-1 for rejected ones."""
    in_answer: Tensor
    """bool: counts in the mean log-probability of its sequence."""
    in_nll: Tensor
    """bool: counts in the NLL."""
    num_pairs: int
    """B, with pairs that have no rejected answer.  A Python number, so that reading it does not wait for the device."""
    weights: Tensor | None = None
    """fp32: the weight of the target's pair; None: 1 for all."""
    margins: Tensor | None = None
    """fp32: the margin of the target's pair; None: 0 for all."""

    @classmethod
    def from_table(cls, table: Tensor, num_pairs: int) -> "Targets":
        """Unpacks a [N, 4] `labels` tensor (see the module's docstring)."""
        if table.ndim != 2 or table.shape[1] not in (4, 5):
            raise BatchError(
                f"expected the [N, 4] labels that ORPOCollator makes, got a tensor of shape {tuple(table.shape)}: "
                "use ORPOCollator as the data collator"
            )
        positions, token_ids, sequence_ids, terms = table[:, :4].unbind(1)
        # A table of two rows per pair may have been cut to the number of padded rows.  A whole one has the last pair's.
        if num_pairs == 0 or (len(table) == 2 * num_pairs and int(sequence_ids[-1]) % num_pairs != num_pairs - 1):
            raise BatchError(CUT)
        weights, margins = None, None
        if table.shape[1] == 5:
            weights, margins = table[:, 4:].contiguous().view(torch.float32).unbind(1)
        return cls(
            positions=positions,
            token_ids=token_ids,
            sequence_ids=sequence_ids,
            in_answer=(terms & IN_ANSWER) != 0,
            in_nll=(terms & IN_NLL) != 0,
            num_pairs=num_pairs,
            weights=weights,
            margins=margins,
        )

    @classmethod
    def from_labels(cls, labels: Tensor, nll_labels: Tensor | None, ignore_index: int) -> "Targets":
        """The table for padded labels that are shifted already.

        `labels` [2B, T]: the token that each position predicts.  `nll_labels` [B, T]: the same for the NLL of the
        chosen sequences; default: the chosen half of `labels`.
        """
        num_pairs, length = labels.shape[0] // 2, labels.shape[1]
        nll = torch.full_like(labels, ignore_index)
        nll[:num_pairs] = labels[:num_pairs] if nll_labels is None else nll_labels
        in_answer, in_nll = labels != ignore_index, nll != ignore_index
        if nll_labels is not None:
            clash = in_answer & in_nll & (labels != nll)
            if bool(clash.any()):
                row, position = (int(i) for i in clash.nonzero()[0])
                raise BatchError(
                    f"labels[{row}, {position}] is {int(labels[row, position])} but nll_labels[{row}, {position}] is "
                    f"{int(nll[row, position])}: one position predicts one token, so both must agree where both are set"
                )
        # Pair by pair, chosen before rejected, so that a kernel can finish a pair before the next one.
        order = torch.arange(2 * num_pairs, device=labels.device).view(2, num_pairs).T.reshape(-1)
        sequence, column = (in_answer | in_nll)[order].nonzero(as_tuple=True)
        sequence = order[sequence]
        token_ids = torch.where(in_answer, labels, nll)[sequence, column]
        return cls(
            positions=sequence * length + column,
            token_ids=token_ids,
            sequence_ids=sequence,
            in_answer=in_answer[sequence, column],
            in_nll=in_nll[sequence, column],
            num_pairs=num_pairs,
        )

    def answer_lengths(self) -> Tensor:
        """fp32 [2B]: answer tokens of each sequence; 0 for a missing rejected answer."""
        return self.sum_by_sequence(self.in_answer.float())

    def pair_weights(self) -> Tensor:
        """fp32 [B]: the weight of each pair."""
        ones = self.in_answer.new_ones(self.num_pairs, dtype=torch.float32)
        return ones if self.weights is None else self._of_pairs(self.weights)

    def pair_margins(self) -> Tensor | None:
        """fp32 [B]: the margin of each pair; None where no pair has one."""
        return None if self.margins is None else self._of_pairs(self.margins)

    def _of_pairs(self, values: Tensor) -> Tensor:
        """[B], from values [N] that are equal for all targets of a pair."""
        index = torch.arange(self.num_pairs, device=values.device)
        # The value of the first target of the chosen sequence, which every pair has.
        return values[(self.sequence_ids[None, :] == index[:, None]).int().argmax(1)]

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[2B] sums of `values` [N] over the targets of each sequence, deterministic on every device."""
        # Not index_add, which adds in a random order on GPUs.
        index = torch.arange(2 * self.num_pairs, device=values.device)
        return torch.where(self.sequence_ids[None, :] == index[:, None], values[None, :], 0.0).sum(dim=1)


def targets_of(batch: Mapping[str, Any]) -> Targets:
    """The targets of a batch; `BatchError` where it was not made by `ORPOCollator`."""
    if not isinstance(batch.get("labels"), Tensor) or not isinstance(batch.get("shift_labels"), Tensor):
        raise BatchError(
            f"the batch has keys {sorted(batch)}: make it with ORPOCollator, which adds labels and shift_labels"
        )
    labels, nll_targets = batch["labels"], batch["shift_labels"]
    targets = Targets.from_table(labels, nll_targets.shape[0] // 2)
    # A batch that was cut has tensors of one length.  Only then compare values, which waits for the device.
    if labels.shape[0] == batch["input_ids"].shape[0] and targets.in_nll.sum() != (nll_targets != IGNORE_INDEX).sum():
        raise BatchError(CUT)
    return targets
