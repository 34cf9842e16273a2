"""Which row of the hidden states predicts which token, for which answer, in which term.

A layout decides where tokens stand in the forward pass; everything after the forward pass only sees
this table.  It is the one interface between layouts and kernels.

In a batch the table travels as a single `labels` tensor of shape [N, 4], int64, one line per
prediction: (row of the flattened hidden states, token, sequence, terms).  `terms` is a bit set:
`IN_ANSWER` counts in the sequence's mean log-probability, `IN_NLL` counts in the NLL.  Sequences
0..B-1 are the chosen answers and B..2B-1 the rejected ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_plugins.errors import BatchError

IN_ANSWER = 1
IN_NLL = 2
IGNORE_INDEX = -100


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
    """B, known on the host so that nothing has to wait for the device."""

    @classmethod
    def from_table(cls, table: Tensor, num_pairs: int) -> "Predictions":
        """Unpacks a [N, 4] `labels` tensor (see the module's docstring)."""
        if table.ndim != 2 or table.shape[1] != 4:
            raise BatchError(
                f"expected the [N, 4] labels that ORPOCollator makes, got a tensor of shape {tuple(table.shape)}: "
                "use ORPOCollator as the data collator"
            )
        rows, tokens, sequences, terms = table.unbind(1)
        return cls(
            rows=rows,
            tokens=tokens,
            sequences=sequences,
            in_answer=(terms & IN_ANSWER) != 0,
            in_nll=(terms & IN_NLL) != 0,
            num_pairs=num_pairs,
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
        """fp32 [2B]: answer tokens of each sequence."""
        return self.sum_by_sequence(self.in_answer.float())

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[2B] sums of `values` [N] over the lines of each sequence, deterministic on every device."""
        # A product with a one-hot matrix instead of index_add: the latter adds in a random order on GPUs.
        index = torch.arange(2 * self.num_pairs, device=values.device)
        return torch.where(self.sequences[None, :] == index[:, None], values[None, :], 0.0).sum(dim=1)
