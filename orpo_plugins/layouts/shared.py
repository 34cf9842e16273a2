"""*shared*: `[prompt | chosen | rejected]` per pair in one row [1, S].  Each prompt is computed once.

    tokens         prompt  chosen  rejected
    position_ids   0 1 2 | 3 4 5 | 3 4
                     ▲       │        │        both answers attend to the one prompt, and not to each other
                     └───────┴────────┘

The positions of the rejected answer continue from the prompt, as if the chosen answer were not there.

The shared part is the longest common prefix of the two token sequences, whatever their labels are.  So prompts that
differ (cut differently, another history) share less, and answers that begin with the same tokens share more.
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
    return [Shared()]


class Shared(OneRow):
    """See the module's docstring."""

    name = "shared"
    priority = 20

    def collate(self, pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
        """The last position of the shared prefix predicts two tokens, the next one of each sequence."""
        row = RowBuilder()
        for index, pair in enumerate(pairs):
            start, chosen, rejected = row.length, pair.chosen, pair.rejected
            prefix = common_prefix(chosen.input_ids, rejected.input_ids)
            # 1. Add the complete chosen sequence.
            positions = torch.arange(start, start + len(chosen.input_ids))
            row.tables.append(sequence_targets(chosen, positions, index, nll_over=nll_over))
            row.add(chosen.input_ids)
            # 2. Add the rejected sequence without the prefix.  The chosen sequence has the prefix already.
            rest = torch.arange(row.length, row.length + len(rejected.input_ids) - prefix)
            positions = torch.cat([positions[:prefix], rest])
            row.tables.append(sequence_targets(rejected, positions, len(pairs) + index, nll_over=None))
            row.add(rejected.input_ids[prefix:], context_start=start, context_length=prefix)
        return row.batch()

    def token_cost(self, lengths: PairLengths) -> Tensor:
        return (lengths.chosen + lengths.rejected - lengths.shared_prefix)[:, None]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens with which both sequences begin."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
