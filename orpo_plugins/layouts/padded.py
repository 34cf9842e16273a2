"""*padded*: input_ids [2B, T], chosen sequences first, padded on the right to the longest, as TRL does it.

The layout that every decoder can run, and with which the others are compared.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Pair
from orpo_plugins.layouts.target_table import labels_and_shift_labels, sequence_targets
from orpo_plugins.models.head import is_encoder_decoder, unwrap_model


@hookimpl
def orpo_layouts() -> list[Layout]:
    """This layout."""
    return [Padded()]


class Padded(Layout):
    """See the module's docstring."""

    name = "padded"
    one_sequence_per_row = True

    def collate(self, pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
        sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        width = max(len(sequence.input_ids) for sequence in sequences)
        input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        attention_mask[:, 0] = 1  # also where a rejected answer is not there: attention to nothing at all is NaN
        for row, sequence in enumerate(sequences):
            length = len(sequence.input_ids)
            input_ids[row, :length] = torch.tensor(sequence.input_ids, dtype=torch.long)
            attention_mask[row, :length] = 1
        tables = [
            sequence_targets(
                sequences[row],
                torch.arange(row * width, row * width + len(sequences[row].input_ids)),
                row,
                nll_over=nll_over if row < len(pairs) else None,
            )
            for pair in range(len(pairs))
            for row in (pair, len(pairs) + pair)
        ]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **labels_and_shift_labels(tables, len(pairs)),
        }

    def unsupported(self, model: nn.Module) -> str | None:
        if not is_encoder_decoder(model):
            return None
        return f"{type(unwrap_model(model)).__name__} is an encoder-decoder model, whose prompts belong to the encoder"


def widened(batch: dict[str, Any], multiple: int, pad_token_id: int) -> dict[str, Any]:
    """A batch with one sequence per row, its width T rounded up to a multiple."""
    width = batch["input_ids"].shape[1]
    more = -width % multiple
    labels = batch["labels"].clone()
    # A position counts row by row, so that every row before it adds the new columns.
    labels[:, 0] += labels[:, 0] // width * more

    def pad(table: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(table, (0, more), value=value)

    inputs = {"input_ids": pad(batch["input_ids"], pad_token_id), "attention_mask": pad(batch["attention_mask"], 0)}
    return {**batch, **inputs, "labels": labels}
