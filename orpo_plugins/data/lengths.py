"""What the pairs of a tokenized dataset cost in a layout, without making a Python object per token."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_plugins.data.tokenized_rows import COLUMNS
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.targets import IGNORE_INDEX

_AT_ONCE = 1000
"""The tokens of so many examples are in memory together."""

Integers = NDArray[np.int64]


def token_costs(dataset: Any, layout: Layout, *, multiple_of: int = 1) -> list[tuple[int, ...]]:
    """What each pair of a tokenized dataset costs in `layout`: the `lengths` of `PairBatches(..., padded=layout.pads)`.

    `multiple_of` is the collator's `pad_to_multiple_of`.
    """
    costs = torch.cat([layout.token_cost(lengths) for lengths in pair_lengths(dataset)])
    return [tuple(cost) for cost in (-(-costs // multiple_of) * multiple_of).tolist()]


def pair_lengths(dataset: Any) -> Iterator["ColumnLengths"]:
    """`hooks.PairLengths` of a tokenized dataset, part by part in its order."""
    for start in range(0, len(dataset), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(dataset))
        if hasattr(dataset, "with_format"):  # datasets.Dataset
            table = dataset.select_columns(list(COLUMNS)).with_format("arrow")[start:stop]
            yield ColumnLengths(*(Lists.from_arrow(table[column].combine_chunks()) for column in COLUMNS))
        else:
            rows = [dataset[index] for index in range(start, stop)]
            yield ColumnLengths(*(Lists.from_lists([row[column] for row in rows]) for column in COLUMNS))


class Lists:
    """B lists of integers as one array of values, and where each list begins and ends in it."""

    def __init__(self, values: Integers, offsets: Integers) -> None:
        self.values, self.starts, self.lengths = values, offsets[:-1], np.diff(offsets)

    @classmethod
    def from_arrow(cls, array: Any) -> "Lists":
        return cls(array.values.to_numpy(), array.offsets.to_numpy().astype(np.int64))

    @classmethod
    def from_lists(cls, lists: list[list[int]]) -> "Lists":
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return cls(np.concatenate([np.asarray(part, dtype=np.int64) for part in lists]), offsets)

    def elements(self, lengths: Integers) -> tuple[Integers, Integers, Integers]:
        """Of the first `lengths` [B] elements of each list: the number of its list, its place there, its value."""
        lists = np.repeat(np.arange(len(lengths)), lengths)
        places = np.arange(len(lists)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return lists, places, self.values[self.starts[lists] + places]


class ColumnLengths:
    """`hooks.PairLengths` of B examples, from their `COLUMNS`; what reads every token is computed when asked for."""

    def __init__(self, chosen: Lists, chosen_labels: Lists, rejected: Lists, rejected_labels: Lists) -> None:
        self._chosen, self._rejected = chosen, rejected
        self._chosen_labels, self._rejected_labels = chosen_labels, rejected_labels

    @property
    def chosen(self) -> Tensor:
        return torch.from_numpy(self._chosen.lengths)

    @property
    def rejected(self) -> Tensor:
        return torch.from_numpy(self._rejected.lengths)

    @cached_property
    def shared_prefix(self) -> Tensor:
        shorter = np.minimum(self._chosen.lengths, self._rejected.lengths)
        lists, places, chosen = self._chosen.elements(shorter)
        *_, rejected = self._rejected.elements(shorter)
        return torch.from_numpy(_first_place(chosen != rejected, lists, places, shorter))

    @cached_property
    def chosen_prompt(self) -> Tensor:
        return _prompt_lengths(self._chosen_labels)

    @cached_property
    def rejected_prompt(self) -> Tensor:
        return _prompt_lengths(self._rejected_labels)


def _prompt_lengths(labels: Lists) -> Tensor:
    lists, places, values = labels.elements(labels.lengths)
    return torch.from_numpy(_first_place(values != IGNORE_INDEX, lists, places, labels.lengths))


def _first_place(marked: NDArray[np.bool_], lists: Integers, places: Integers, default: Integers) -> Integers:
    """[B]: the place of the first marked element of each list, `default` where none is marked."""
    found = default.copy()
    # Backwards, since of several assignments to one list the last one stays.
    found[lists[marked][::-1]] = places[marked][::-1]
    return found
