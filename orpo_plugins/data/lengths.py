"""The lengths of pairs in a tokenized dataset, and their cost in a layout.  Makes no Python object per token."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_plugins.data.row_tokenizer import COLUMNS
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.targets import IGNORE_INDEX

_AT_ONCE = 1000
"""The number of rows whose tokens are in memory at the same time."""

Integers = NDArray[np.int64]


def token_costs(dataset: Any, layout: Layout, *, multiple_of: int = 1) -> list[tuple[int, ...]]:
    """The cost in tokens of each pair in `layout`: the `lengths` of `PairBatches(..., padded=layout.pads)`.

    `multiple_of` is the collator's `pad_to_multiple_of`.
    """
    costs = torch.cat([layout.token_cost(lengths) for lengths in pair_lengths(dataset)])
    return [tuple(cost) for cost in (-(-costs // multiple_of) * multiple_of).tolist()]


def pair_lengths(dataset: Any) -> Iterator["ColumnLengths"]:
    """`hooks.PairLengths` of a tokenized dataset, in its order, for `_AT_ONCE` rows at a time."""
    for start in range(0, len(dataset), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(dataset))
        if hasattr(dataset, "with_format"):  # datasets.Dataset
            table = dataset.select_columns(list(COLUMNS)).with_format("arrow")[start:stop]
            yield ColumnLengths(*(Lists.from_arrow(table[column].combine_chunks()) for column in COLUMNS))
        else:
            rows = [dataset[index] for index in range(start, stop)]
            yield ColumnLengths(*(Lists.from_lists([row[column] for row in rows]) for column in COLUMNS))


class Lists:
    """B lists of integers: one array with all values, and the start and length of each list in it."""

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
        """The first `lengths` [B] elements of each list, as three arrays: number of the list, index in it, value."""
        lists = np.repeat(np.arange(len(lengths)), lengths)
        indices = np.arange(len(lists)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return lists, indices, self.values[self.starts[lists] + indices]


class ColumnLengths:
    """`hooks.PairLengths` of B rows.  Properties that have to read every token are computed on first use."""

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
        lists, indices, chosen = self._chosen.elements(shorter)
        *_, rejected = self._rejected.elements(shorter)
        return torch.from_numpy(_first_index(chosen != rejected, lists, indices, shorter))

    @cached_property
    def chosen_prompt(self) -> Tensor:
        return _prompt_lengths(self._chosen_labels)

    @cached_property
    def rejected_prompt(self) -> Tensor:
        return _prompt_lengths(self._rejected_labels)


def _prompt_lengths(labels: Lists) -> Tensor:
    lists, indices, values = labels.elements(labels.lengths)
    return torch.from_numpy(_first_index(values != IGNORE_INDEX, lists, indices, labels.lengths))


def _first_index(marked: NDArray[np.bool_], lists: Integers, indices: Integers, default: Integers) -> Integers:
    """[B]: the index of the first marked element of each list, or its `default` if no element is marked."""
    found = default.copy()
    # In reverse order: of several assignments to the same list, the last one stays.
    found[lists[marked][::-1]] = indices[marked][::-1]
    return found
