"""How pairs are laid out for one forward pass.

*padded*: [2B, T], chosen rows first, padded on the right to the longest, as TRL does it.  The layouts without
padding are in `layouts/one_row.py`, that of encoder-decoder models is in `layouts/encoder_decoder.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Layout, Pair, TokenSequence
from orpo_plugins.models.head import is_encoder_decoder, unwrap_model
from orpo_plugins.targets import IGNORE_INDEX, IN_ANSWER, IN_NLL

Target = tuple[int, int, int, int]
"""One target of the `labels` table: (row, token, sequence, terms)."""


@hookimpl
def orpo_layouts() -> list[Layout]:
    """The built-in layouts."""
    from orpo_plugins.layouts import encoder_decoder, one_row

    return [
        Layout(name="padded", collate=collate_padded, unsupported=_not_a_decoder),
        *one_row.layouts(),
        *encoder_decoder.layouts(),
    ]


def _not_a_decoder(model: torch.nn.Module) -> str | None:
    if not is_encoder_decoder(model):
        return None
    return f"{type(unwrap_model(model)).__name__} is an encoder-decoder model, whose prompts belong to the encoder"


def collate_padded(pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Tensor]:
    """[2B, T] inputs, chosen rows first; see `LayoutFunction` for the keys."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    width = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    attention_mask[:, 0] = 1  # also where a rejected answer is not there: attention to nothing at all is NaN
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        attention_mask[row, : len(sequence.input_ids)] = 1
    targets = [
        target
        for pair in range(len(pairs))
        for row in (pair, len(pairs) + pair)
        for target in sequence_targets(
            sequences[row], row * width, row, nll_over=nll_over if row < len(pairs) else None
        )
    ]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.tensor(targets, dtype=torch.long).reshape(-1, 4),
        "shift_labels": nll_targets(targets, len(sequences)),
    }


def sequence_targets(sequence: TokenSequence, first_row: int, index: int, *, nll_over: str | None) -> list[Target]:
    """The targets of one contiguous sequence whose first token stands in row `first_row`.

    `nll_over` is "sequence" (prompt and answer), "completion" (the answer alone) or None (not in the NLL).
    """
    targets = []
    for position in range(1, len(sequence.input_ids)):
        in_answer = sequence.labels[position] != IGNORE_INDEX
        in_nll = nll_over == "sequence" or (nll_over == "completion" and in_answer)
        if in_answer or in_nll:
            terms = IN_ANSWER * in_answer | IN_NLL * in_nll
            targets.append((first_row + position - 1, sequence.input_ids[position], index, terms))
    return targets


def nll_targets(targets: list[Target], num_sequences: int) -> Tensor:
    """[2B, L]: the NLL's token ids by sequence, -100 elsewhere (what a stock Trainer counts)."""
    by_sequence: list[list[int]] = [[] for _ in range(num_sequences)]
    for _, token, sequence, terms in targets:
        if terms & IN_NLL:
            by_sequence[sequence].append(token)
    table = torch.full((num_sequences, max(1, *map(len, by_sequence))), IGNORE_INDEX, dtype=torch.long)
    for row, tokens in enumerate(by_sequence):
        table[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return table
