"""*packed*: all sequences in one row [1, S], one after the other, without padding.  Each is a span of its own.

tokens         chosen 0    rejected 0   chosen 1  rejected 1
position_ids   0 1 2 3 4   0 1 2 3      0 1 2     0 1 2 3 4
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orpo_plugins.hooks.layout import Layout, PairLengths
from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Pair
from orpo_plugins.layouts.one_row import OneRow, RowBuilder
from orpo_plugins.layouts.target_table import sequence_targets


@hookimpl
def orpo_layouts() -> list[Layout]:
    """This layout."""
    return [Packed()]


class Packed(OneRow):
    """See the module's docstring."""

    name = "packed"
    priority = 10

    def collate(self, pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
        row = RowBuilder()
        for index, pair in enumerate(pairs):
            for sequence, number, nll in ((pair.chosen, index, nll_over), (pair.rejected, len(pairs) + index, None)):
                positions = torch.arange(row.length, row.length + len(sequence.input_ids))
                row.tables.append(sequence_targets(sequence, positions, number, nll_over=nll))
                row.add(sequence.input_ids)
        return row.batch()

    def token_cost(self, lengths: PairLengths) -> Tensor:
        return (lengths.chosen + lengths.rejected)[:, None]
