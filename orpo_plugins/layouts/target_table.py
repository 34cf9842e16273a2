"""The `labels` table of a batch, which `targets.py` defines, from the sequences of its pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from orpo_plugins.hooks.types import TokenSequence
from orpo_plugins.targets import IGNORE_INDEX, IN_ANSWER, IN_NLL


def sequence_targets(sequence: TokenSequence, positions: Tensor, index: int, *, nll_over: str | None) -> Tensor:
    """int64 [n, 4]: the targets of a decoder's sequence of L tokens; token t is predicted at the position of t - 1.

    Args:
        sequence: number `index` of the batch (0..B-1 chosen, B..2B-1 rejected).
        positions: int64 [L]: where its tokens stand in the hidden states, flattened to [positions, H].
        index: see `sequence`.
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
    """int64 [n, 4]: the rows of a table for one sequence, without those that are in no term of the loss."""
    table = torch.stack([positions, token_ids, torch.full_like(positions, index), terms], dim=1)
    return table[terms != 0]


def labels_and_shift_labels(tables: Sequence[Tensor], num_pairs: int) -> dict[str, Tensor]:
    """The two keys of every batch, from the table of each sequence: chosen, rejected, chosen, rejected, …"""
    # pad_sequence wants at least one column; sequences of a batch are numbered chosen ones first.
    in_nll = [table[(table[:, 3] & IN_NLL) != 0, 1] for table in (*tables[::2], *tables[1::2])]
    shift_labels = pad_sequence(in_nll, batch_first=True, padding_value=IGNORE_INDEX)
    if shift_labels.shape[1] == 0:
        shift_labels = torch.full((2 * num_pairs, 1), IGNORE_INDEX)
    return {"labels": torch.cat(list(tables)), "shift_labels": shift_labels}
