"""Makes a pair of token sequences from a row, and the columns of a tokenized row from a pair."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from orpo_plugins.data.chat_id_pairs import ChatIdPairBuilder, gives_chats_as_ids
from orpo_plugins.data.encoder_decoder_pairs import EncoderDecoderPairBuilder
from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder, PromptAndAnswer
from orpo_plugins.data.row_formats import parse_row
from orpo_plugins.data.row_values import shortened
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.hooks.types import TokenSequence
from orpo_plugins.options import PairOptions
from orpo_plugins.targets import IGNORE_INDEX, prompt_length

COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
"""The columns of a tokenized row.  Labels are -100 on the prompt."""

NUMBERS = {"weight": 1.0, "margin": 0.0}
"""Optional columns of raw and tokenized rows (see `Pair`), with their defaults."""


def pair_builder(tokenizer: Any, options: PairOptions) -> PairBuilder:
    """The builder for this kind of model and tokenizer."""
    if not gives_chats_as_ids(tokenizer):
        return (EncoderDecoderPairBuilder if options.encoder_decoder else PairBuilder)(tokenizer, options)
    if options.encoder_decoder:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not encode special tokens that stand in text, but pairs of an "
            "encoder-decoder model need that: use the tokenizer of the model"
        )
    return ChatIdPairBuilder(tokenizer, options)


class RowTokenizer:
    """Called with a raw or tokenized row and its number, returns a `BuiltPair` or `Dropped`."""

    def __init__(self, tokenizer: Any, options: PairOptions) -> None:
        self.builder = pair_builder(tokenizer, options)

    def __call__(self, row: Mapping[str, Any], index: int | str) -> BuiltPair | Dropped:
        """Raises `RowError` with the row's number for a malformed row."""
        tokenized = isinstance(row, Mapping) and set(COLUMNS) <= set(row)
        options = self.builder.options
        preference = (
            None
            if tokenized
            else parse_row(row, index, sft_rows=options.sft_rows, template_strings=options.template_strings)
        )
        try:
            numbers = {name: _number(row, name) for name in NUMBERS}
            if numbers["weight"] == 0:
                return Dropped(reason="the weight is 0")
            built = self._from_tokens(row) if preference is None else self.builder(preference)
        except RowError as error:
            raise RowError(f"row {index}: {error}") from error
        if numbers == NUMBERS or isinstance(built, Dropped):
            return built
        pair = dataclasses.replace(built.pair, weight=numbers["weight"], margin=numbers["margin"])
        return dataclasses.replace(built, pair=pair)

    def _from_tokens(self, row: Mapping[str, Any]) -> BuiltPair | Dropped:
        chosen, rejected = tokenized_answer(row, "chosen"), tokenized_answer(row, "rejected")
        if self.builder.options.sft_rows and chosen.ids and not (rejected.prompt or rejected.ids):
            return self.builder.fit(chosen)
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer.ids:
                return Dropped(reason=f"the {name} answer is empty")
        if chosen == rejected:
            return Dropped(reason="chosen equals rejected")
        return self.builder.fit(chosen, rejected)


def tokenized_answer(row: Mapping[str, Any], name: str) -> PromptAndAnswer:
    """Reads and checks `<name>_input_ids` and `<name>_labels`, without tokens that `<name>_attention_mask` masks."""
    ids, labels = _integers(row, f"{name}_input_ids"), _integers(row, f"{name}_labels")
    if len(ids) != len(labels):
        raise RowError(f"{name}_input_ids has {len(ids)} tokens but {name}_labels has {len(labels)}")
    if row.get(f"{name}_attention_mask") is not None:
        mask = _integers(row, f"{name}_attention_mask")
        if len(mask) != len(ids):
            raise RowError(f"{name}_input_ids has {len(ids)} tokens but {name}_attention_mask has {len(mask)}")
        ids = [token for token, seen in zip(ids, mask, strict=True) if seen]
        labels = [token for token, seen in zip(labels, mask, strict=True) if seen]
    start = prompt_length(labels)
    # Two fast comparisons, which nearly every row passes, before a loop over tokens.
    if min(ids, default=0) < 0 or labels[start:] != ids[start:]:
        _check_tokens(ids, labels, name)
    return PromptAndAnswer(ids[:start], ids[start:], labels[start:])


def _check_tokens(ids: list[int], labels: list[int], name: str) -> None:
    """Raises `RowError` for a negative token id, and for a label that is neither the token nor -100."""
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token < 0:
            raise RowError(f"{name}_input_ids[{position}] is {token}: token ids are not negative")
        if label not in (token, IGNORE_INDEX):
            raise RowError(
                f"{name}_labels[{position}] is {label} but {name}_input_ids[{position}] is {token}: a label is the "
                f"token at the same position (not shifted), or {IGNORE_INDEX}"
            )


def _number(row: Mapping[str, Any], column: str) -> float:
    """The value of a column of `NUMBERS`, or its default if the row has none."""
    value = row.get(column)
    if value is None:
        return NUMBERS[column]
    value = value.item() if hasattr(value, "item") else value
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (column == "weight" and value < 0):
        wanted = "a finite number >= 0" if column == "weight" else "a finite number"
        raise RowError(
            f"column {column!r} is {shortened(value)}, expected {wanted}: it changes how much the row counts. Rename "
            "the column if it means something else"
        )
    return float(value)


def _integers(row: Mapping[str, Any], column: str) -> list[int]:
    value = row[column]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(issubclass(kind, int) for kind in set(map(type, value))):
        raise RowError(f"column {column!r} is {shortened(value)}, expected a list of token ids")
    return list(value)


def tokenized_row(built: BuiltPair, numbers: Iterable[str] | None = None) -> dict[str, Any]:
    """The columns of a tokenized row, and `length`, the number of tokens of both sequences.

    `numbers` are the columns of `NUMBERS` to add; by default, those whose value is not the default.
    """

    def columns(name: str, sequence: TokenSequence) -> dict[str, list[int]]:
        return {f"{name}_input_ids": sequence.input_ids, f"{name}_labels": sequence.labels}

    pair = built.pair
    length = len(pair.chosen.input_ids) + len(pair.rejected.input_ids)
    if numbers is None:
        numbers = [name for name, default in NUMBERS.items() if getattr(pair, name) != default]
    return {
        **columns("chosen", pair.chosen),
        **columns("rejected", pair.rejected),
        "length": length,
        **{name: getattr(pair, name) for name in numbers},
    }
