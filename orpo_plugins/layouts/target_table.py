"""Makes the `labels` table of a batch, which `targets.py` defines, from the sequences of its pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from orpo_plugins.hooks.types import TokenSequence
from orpo_plugins.targets import IGNORE_INDEX, IN_ANSWER, IN_NLL


def sequence_targets(sequence: TokenSequence, positions: Tensor, index: int, *, nll_over: str | None) -> Tensor:
    """int64 [n, 4]: the targets of a decoder's sequence.  The hidden state of token t - 1 predicts token t.

    Args:
        sequence: L tokens.
        positions: int64 [L]: the position of each token in the hidden states, flattened to [positions, H].
        index: the number of the sequence in the batch: 0..B-1 chosen, B..2B-1 rejected.
        nll_over: "sequence" (prompt and answer), "completion" (the answer alone) or None (not in the NLL).
    """
    token_ids = torch.tensor(sequence.input_ids[1:], dtype=torch.long)
    labels = torch.tensor(sequence.labels[1:], dtype=torch.long)
    in_answer = labels != IGNORE_INDEX
    terms = IN_ANSWER * in_answer
    if nll_over is not None:
        terms = terms + IN_NLL * (in_answer if nll_over == "completion" else torch.ones_like(in_answer))
    return target_table(positions[:-1], token_ids, index, terms)


def target_table(positions: Tensor, token_ids: Tensor, index: int, terms: Tensor) -> Tensor:
    """int64 [n, 4]: the targets of one sequence.  Leaves out those that no term of the loss counts."""
    table = torch.stack([positions, token_ids, torch.full_like(positions, index), terms], dim=1)
    return table[terms != 0]


def labels_and_shift_labels(chosen: Sequence[Tensor], rejected: Sequence[Tensor]) -> dict[str, Tensor]:
    """The keys `labels` and `shift_labels` of a batch, from the tables of its B chosen and B rejected sequences."""
    labels = [table for pair in zip(chosen, rejected, strict=True) for table in pair]
    nll_tokens = [table[(table[:, 3] & IN_NLL) != 0, 1] for table in (*chosen, *rejected)]
    shift_labels = pad_sequence(nll_tokens, batch_first=True, padding_value=IGNORE_INDEX)
    if shift_labels.shape[1] == 0:  # no target counts in the NLL: one column of padding
        shift_labels = torch.full((2 * len(chosen), 1), IGNORE_INDEX)
    return {"labels": torch.cat(labels), "shift_labels": shift_labels}
