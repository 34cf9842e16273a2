"""*padded*: `input_ids` [2B, T], chosen sequences first, padded on the right to the longest, as in TRL.

    chosen 0     x x x x x x
    chosen 1     x x x · · ·
    rejected 0   x x x x · ·
    rejected 1   x x x x x ·

Every decoder can run this layout.  The other layouts are compared with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
        inputs = padded_inputs([sequence.input_ids for sequence in sequences], pad_token_id)
        width = inputs["input_ids"].shape[1]
        tables = [
            sequence_targets(
                sequence,
                torch.arange(index * width, index * width + len(sequence.input_ids)),
                index,
                nll_over=nll_over if index < len(pairs) else None,
            )
            for index, sequence in enumerate(sequences)
        ]
        return {**inputs, **labels_and_shift_labels(tables[: len(pairs)], tables[len(pairs) :])}

    def unsupported(self, model: nn.Module) -> str | None:
        if not is_encoder_decoder(model):
            return None
        return f"{type(unwrap_model(model)).__name__} is an encoder-decoder model, whose prompts belong to the encoder"


def padded_inputs(sequences: Sequence[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [R, T] of R sequences.

    A sequence without tokens (a rejected answer that does not exist) attends to one padding token: attention to nothing
    would be NaN.
    """
    input_ids = pad_right(sequences, pad_token_id)
    lengths = torch.tensor([[max(1, len(sequence))] for sequence in sequences])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths).long()}


def pad_right(sequences: Sequence[list[int]], value: int) -> Tensor:
    """int64 [R, T]: R sequences, filled up with `value` to the longest."""
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def widened(batch: dict[str, Any], multiple: int, pad_token_id: int) -> dict[str, Any]:
    """A batch with one sequence per row, its width T rounded up to a multiple."""
    width = batch["input_ids"].shape[1]
    more = -width % multiple
    labels = batch["labels"].clone()
    # Positions count through all rows, so each row before a position adds the new columns once.
    labels[:, 0] += labels[:, 0] // width * more

    def pad(table: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(table, (0, more), value=value)

    inputs = {"input_ids": pad(batch["input_ids"], pad_token_id), "attention_mask": pad(batch["attention_mask"], 0)}
    return {**batch, **inputs, "labels": labels}
