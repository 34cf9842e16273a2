"""Which row of the hidden states predicts which token, for which answer, in which term.

A layout decides where tokens stand in the forward pass; everything after the forward pass only sees
this table.  It is the one interface between layouts and kernels.

In a batch the table travels as a single `labels` tensor of shape [N, 4], int64, one line per
prediction: (row of the flattened hidden states, token, sequence, terms).  `terms` is a bit set:
`IN_ANSWER` counts in the sequence's mean log-probability, `IN_NLL` counts in the NLL, and `IN_DECODER`
says that the row stands in a decoder that has an encoder beside it; the bits from `WIDTH` on are the width of the
batch's `input_ids`, for a loss function that sees no more of a batch than this table.  Sequences 0..B-1 are the chosen
answers and B..2B-1 the rejected ones.  A pair without a rejected answer has no line for it.

Where pairs have weights or margins of their own the table is [N, 5]: behind every line stand those of its pair, two
fp32 numbers in the bits of one int64, so that they go wherever the labels go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_plugins.errors import BatchError

IN_ANSWER = 1
IN_NLL = 2
IN_DECODER = 4
WIDTH = 8
IGNORE_INDEX = -100
CUT = (
    "the batch has lost predictions: something cuts its tensors along their first dimension, as Accelerate does with "
    "batches of streams. Set accelerator_config={'dispatch_batches': False}, or in a loop of your own "
    "Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))"
)
"""What to say of a batch that came out of its data loader incomplete."""


def prompt_length(labels: Sequence[int]) -> int:
    """How many tokens stand before the first that has a label."""
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def with_width(table: Tensor, width: int) -> Tensor:
    """The table that also says how many columns the batch's `input_ids` have."""
    table = table.clone()
    table[:, 3] += WIDTH * width
    return table


def width_of(table: Tensor) -> int | None:
    """What `with_width` has written; None where nobody called it.  Waits for the device."""
    return int(table[0, 3]) // WIDTH or None if len(table) else None


def with_weights(table: Tensor, weights: Sequence[float], margins: Sequence[float]) -> Tensor:
    """The [N, 5] table that adds each pair's weight and margin ([B] numbers) to a [N, 4] one."""
    numbers = torch.tensor(list(zip(weights, margins, strict=True)), dtype=torch.float32).view(torch.int64)
    return torch.cat([table, numbers[table[:, 2] % len(weights)]], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The table, unpacked.  All tensors are [N], on one device; lines of one pair stand together."""

    rows: Tensor
    """int64: index into hidden states flattened to [positions, H]; a row may predict twice (shared prompts)."""
    tokens: Tensor
    """int64: the token that the row predicts."""
    sequences: Tensor
    """int64: 0..B-1 for chosen answers, B..2B-1 for rejected ones."""
    in_answer: Tensor
    """bool: counts in the mean log-probability of its sequence."""
    in_nll: Tensor
    """bool: counts in the NLL."""
    num_pairs: int
    """B, known on the host so that nothing has to wait for the device; pairs without a rejected answer count."""
    weights: Tensor | None = None
    """fp32: the weight of the line's pair; None: 1 for all."""
    margins: Tensor | None = None
    """fp32: the margin of the line's pair; None: 0 for all."""

    @classmethod
    def from_table(cls, table: Tensor, num_pairs: int) -> "Predictions":
        """Unpacks a [N, 4] `labels` tensor (see the module's docstring)."""
        if table.ndim != 2 or table.shape[1] not in (4, 5):
            raise BatchError(
                f"expected the [N, 4] labels that ORPOCollator makes, got a tensor of shape {tuple(table.shape)}: "
                "use ORPOCollator as the data collator"
            )
        rows, tokens, sequences, terms = table[:, :4].unbind(1)
        # Two sequences a pair: a table cut to the length of padded inputs.  Every pair has lines, the last ones last.
        if num_pairs == 0 or (len(table) == 2 * num_pairs and int(sequences[-1]) % num_pairs != num_pairs - 1):
            raise BatchError(CUT)
        weights, margins = None, None
        if table.shape[1] == 5:
            weights, margins = table[:, 4:].contiguous().view(torch.float32).unbind(1)
        return cls(
            rows=rows,
            tokens=tokens,
            sequences=sequences,
            in_answer=(terms & IN_ANSWER) != 0,
            in_nll=(terms & IN_NLL) != 0,
            num_pairs=num_pairs,
            weights=weights,
            margins=margins,
        )

    @classmethod
    def from_labels(cls, labels: Tensor, nll_labels: Tensor | None, ignore_index: int) -> "Predictions":
        """The table for padded, already shifted labels.

        `labels` [2B, T]: the token each position predicts.  `nll_labels` [B, T]: the same for the NLL of
        the chosen rows, default the chosen half of `labels`.
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
        # Pair by pair (chosen, then rejected), so that a kernel may finish a pair before it opens the next.
        order = torch.arange(2 * num_pairs, device=labels.device).view(2, num_pairs).T.reshape(-1)
        sequence, column = (in_answer | in_nll)[order].nonzero(as_tuple=True)
        sequence = order[sequence]
        tokens = torch.where(in_answer, labels, nll)[sequence, column]
        return cls(
            rows=sequence * length + column,
            tokens=tokens,
            sequences=sequence,
            in_answer=in_answer[sequence, column],
            in_nll=in_nll[sequence, column],
            num_pairs=num_pairs,
        )

    def answer_lengths(self) -> Tensor:
        """fp32 [2B]: answer tokens of each sequence; 0 for a rejected answer that is not there."""
        return self.sum_by_sequence(self.in_answer.float())

    def pair_weights(self) -> Tensor:
        """fp32 [B]: the weight of each pair."""
        ones = self.in_answer.new_ones(self.num_pairs, dtype=torch.float32)
        return ones if self.weights is None else self._of_pairs(self.weights)

    def pair_margins(self) -> Tensor | None:
        """fp32 [B]: the margin of each pair; None where none has one."""
        return None if self.margins is None else self._of_pairs(self.margins)

    def _of_pairs(self, values: Tensor) -> Tensor:
        """[B], from values [N] that are the same on all lines of a pair."""
        index = torch.arange(self.num_pairs, device=values.device)
        # Any line of the chosen sequence, which every pair has.
        return values[(self.sequences[None, :] == index[:, None]).int().argmax(1)]

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[2B] sums of `values` [N] over the lines of each sequence, deterministic on every device."""
        # A product with a one-hot matrix instead of index_add: the latter adds in a random order on GPUs.
        index = torch.arange(2 * self.num_pairs, device=values.device)
        return torch.where(self.sequences[None, :] == index[:, None], values[None, :], 0.0).sum(dim=1)
