"""How the fused head cuts the logits [N, V] into tiles, and how many tiles it keeps.

A tile is some targets times some entries of the vocabulary (columns): as many logits as are in memory at once.

                    columns
                  +--------+--------+--------+--------+--------+--------+
          targets |   1    |   2    |   3    |   4    |   5    |   6    |  a band
                  +--------+--------+--------+--------+--------+--------+
        N targets |   7    |   8    |   9    |   10   |   11   |   12   |
                  +--------+--------+--------+--------+--------+--------+
                  |   13   |   14   |   15   |   16   |   17   |   18   |
                  +--------+--------+--------+--------+--------+--------+
                  |<----- kept ---->|<--- a strip --->|<--- a strip --->|
                                V entries of the vocabulary

The scan (`scan.py`) reads the tiles in the order of their numbers, band by band, because the softmax of a target needs
the target's whole row.  The weight's gradient (`weight_gradient.py`) needs all targets for each vocabulary entry.  So
it takes the first columns from tiles that the scan has kept.  The other columns it goes through strip by strip, and
computes their tiles again, in tiles of another size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_plugins.hooks.types import HeadOptions
from orpo_plugins.kernels.products import TERMS_PER_BLOCK, working_dtype

_KEPT_BY_DEFAULT = 2.5
"""Memory for kept tiles, as a multiple of the weight's gradient in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the [N, V] logits are cut."""

    targets: int
    """Targets per tile of the scan; their hidden states are gathered once for the whole vocabulary."""
    columns: int
    """Vocabulary entries per tile of the scan."""
    grad_targets: int
    """Targets per tile of the weight's gradient: the terms that one of its products sums over."""
    grad_columns: int
    """Vocabulary entries per tile of the weight's gradient."""
    kept: int
    """Tiles of each band that are kept from the scan."""

    @property
    def piece(self) -> int:
        """Targets per operation on [targets, H] that is no matrix product, which would gain from more."""
        return max(1, self.targets // 4)

    @property
    def strip(self) -> int:
        """Vocabulary entries whose weight gradient is finished, over all targets, before the next ones begin."""
        return 2 * self.columns

    @classmethod
    def plan(
        cls, count: int, weight: Tensor, options: HeadOptions, *, trainable: bool, fp32_products: bool = False
    ) -> "Tiling":
        """The tiling for `count` targets.

        1. take tiles that stay in a CPU's caches, or that fill a GPU
        2. make them smaller until a few of them fit into the budget
        3. spend the rest of the budget on kept tiles, where the head is `trainable`
        """
        vocabulary, hidden_size = weight.shape
        itemsize = working_dtype(weight.dtype, weight.device, fp32_products=fp32_products).itemsize

        def working_set(targets: int, columns: int) -> int:
            # A tile in fp32 and in the working dtype; the rows of some [targets, H] and of one [columns, H] in fp32.
            return targets * columns * (4 + itemsize) + 4 * hidden_size * (4 * targets + columns)

        budget = options.memory_budget
        targets, columns, fewest = _preferred_tile(weight, itemsize)
        while budget is not None and budget < working_set(targets, columns) and targets * columns > fewest:
            targets, columns = (targets // 2, columns) if 2 * targets >= columns else (targets, columns // 2)
        grad_targets, grad_columns = _grad_tile(count, targets, columns, weight, itemsize)
        targets, columns = _even(count, targets), min(columns, vocabulary)
        kept = 0
        if trainable and count:
            spare = int(_KEPT_BY_DEFAULT * itemsize * weight.numel()) if itemsize == 2 else 0
            if budget is not None:
                spare = max(0, budget - working_set(targets, columns) - count * hidden_size * itemsize)
            kept = min(spare // (count * columns * itemsize), -(-vocabulary // columns))
        return cls(targets=targets, columns=columns, grad_targets=grad_targets, grad_columns=grad_columns, kept=kept)


def _preferred_tile(weight: Tensor, itemsize: int) -> tuple[int, int, int]:
    """(targets, columns, entries below which a tile only gets slower), by measurement."""
    if weight.is_cuda:
        return 4096, 8192, 2**21
    # Every core works on its own columns of a tile, in its own caches.
    threads = min(torch.get_num_threads(), 8)
    return (512, 1024 * threads, 2**16) if itemsize == 2 else (1024 // itemsize, 640 * threads, 2**15)


def _grad_tile(count: int, targets: int, columns: int, weight: Tensor, itemsize: int) -> tuple[int, int]:
    """(grad_targets, grad_columns) of about as many entries as a tile of the scan has, or fewer."""
    entries = targets * columns
    if weight.is_cuda:
        most = 8192
    elif itemsize == 2:
        most = entries // 128  # few partial sums over targets, since each is rounded to 16 bits
    else:
        # The product is as wide as the hidden states and takes the other half of the cache.
        most, entries = TERMS_PER_BLOCK, entries // 2
    grad_targets = min(most, max(count, 1))
    parts = -(-columns // max(128, entries // grad_targets))
    return grad_targets, -(-columns // parts)


def _even(count: int, most: int) -> int:
    """Targets per tile: tiles of about one size, instead of full ones and a small rest that costs as many calls."""
    tiles = -(-count // most)
    return max(count, 1) if tiles <= 1 else min(most, -(-count // (32 * tiles)) * 32)


def cut(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most `step` that cover start..stop."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))
