"""How the fused head cuts its work, and how much of it is kept."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_plugins.hooks.types import HeadOptions
from orpo_plugins.kernels.products import SUMMED, working_dtype


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the [N, V] logits are cut."""

    targets: int
    """Targets per tile of the scan; their hidden states are gathered once for the whole vocabulary."""
    columns: int
    """Vocabulary entries per tile of the scan."""
    block: int
    """Targets that one product of the weight's gradient sums over."""
    width: int
    """Vocabulary entries per tile of the weight's gradient."""
    kept: int
    """Tiles of the vocabulary whose probabilities are kept from the scan, for all targets."""

    @property
    def piece(self) -> int:
        """Targets that are read at once where no matrix product is waiting for many."""
        return max(1, self.targets // 4)

    @property
    def strip(self) -> int:
        """Vocabulary entries of the weight's gradient that are finished, over all targets, before others begin."""
        return 2 * self.columns

    @classmethod
    def plan(
        cls, count: int, weight: Tensor, options: HeadOptions, *, trainable: bool, widens: bool = False
    ) -> "Tiling":
        """For `count` targets: tiles that stay in a CPU's caches, or fill a GPU; smaller ones where the budget asks."""
        vocabulary, hidden_size = weight.shape
        itemsize = working_dtype(weight.dtype, weight.device, widens=widens).itemsize

        def working_set(targets: int, columns: int) -> int:
            return targets * columns * (4 + itemsize) + 4 * hidden_size * (4 * targets + columns)

        if weight.is_cuda:
            targets, columns, smallest = 4096, 8192, 2**21
        elif itemsize == 2:
            targets, columns, smallest = 512, 1024 * _threads(), 2**16
        else:
            targets, columns, smallest = 1024 // itemsize, 640 * _threads(), 2**15
        budget = options.memory_budget
        while budget is not None and budget < working_set(targets, columns) and targets * columns > smallest:
            targets, columns = (targets // 2, columns) if 2 * targets >= columns else (targets, columns // 2)
        block, width = _weight_tile(count, targets, columns, weight, itemsize)
        targets, columns = _even(count, targets), min(columns, vocabulary)
        kept = 0
        if trainable and count:
            spare = 5 * weight.numel() * itemsize // 2 if itemsize == 2 else 0
            if budget is not None:
                spare = max(0, budget - working_set(targets, columns) - count * hidden_size * itemsize)
            kept = spare // (count * columns * itemsize)
        return cls(
            targets=targets,
            columns=columns,
            block=block,
            width=width,
            kept=min(kept, -(-vocabulary // columns)),
        )


def _weight_tile(count: int, targets: int, columns: int, weight: Tensor, itemsize: int) -> tuple[int, int]:
    """(block, width) of about as many entries as a tile of the scan has, or fewer."""
    entries = targets * columns
    if weight.is_cuda:
        most = 8192
    elif itemsize == 2:
        most = entries // 128  # few partial sums over targets, since each is rounded
    else:
        most, entries = SUMMED, entries // 2  # the product is as wide as the hidden states and takes the other half
    block = min(most, max(count, 1))
    parts = -(-columns // max(128, entries // block))
    return block, -(-columns // parts)


def _threads() -> int:
    # Every core works on its own part of a tile, in its own caches.
    return min(torch.get_num_threads(), 8)


def _even(count: int, most: int) -> int:
    """Targets per tile: tiles of about one size, instead of full ones and a small rest that costs as many calls."""
    tiles = -(-count // most)
    return max(count, 1) if tiles <= 1 else min(most, -(-count // (32 * tiles)) * 32)


def cut(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most `step` that cover start..stop."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def blank(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory that is about to be written."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
