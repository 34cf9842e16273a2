"""The gradient of hidden states, from when it is known up to a factor per target until the factors are known.

What a target weighs in the loss depends on the log-probabilities of all targets of its pair, so d logp / d hidden of
each target waits for the last one.  It waits in the memory of the gradient that is returned:

    1. sort the targets by their positions (rows of the hidden states)
    2. store target i at row i, which is never behind its own position; where a position has two targets (the end of a
       shared prompt), the second one waits in memory of its own
    3. once all factors are known, move every target to its position, from the last to the first, times its factor

        position  0 1 2 3 4 5          waiting    a b c . . .
        target    . a . b . c    ->    moved      . a . b . c
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_plugins.hooks.types import HeadOptions
from orpo_plugins.kernels.tiling import blank, cut


class HiddenGradient:
    """[M, H], in the dtype of the hidden states."""

    def __init__(self, hidden: Tensor, positions: Tensor, *, spare: int) -> None:
        """`positions` [N]: the row of `hidden` [M, H] that each target reads.

        Up to `spare` bytes, 16-bit gradients wait in fp32 beside the returned memory, so that they are rounded once
        and not twice, and all gradients on a GPU, since the host would have to wait for the order of the positions.
        """
        self._shape, self._dtype = hidden.shape, hidden.dtype
        self._wide = wide = torch.promote_types(hidden.dtype, torch.float32)
        aside = hidden.dtype != wide or hidden.is_cuda
        self._beside = aside and len(positions) * hidden.shape[1] * wide.itemsize <= spare
        self.order: Tensor | None = None
        """[N]: the targets in the order in which they have to be read; None for any."""
        self._positions, self._first = positions, len(positions)
        if self._beside:
            self._waiting = blank((len(positions), hidden.shape[1]), hidden, wide)
        else:
            self._sort_targets()
            self._waiting = blank(tuple(hidden.shape), hidden)
        self._further = blank((len(positions) - self._first, hidden.shape[1]), hidden)

    def _sort_targets(self) -> None:
        """By position; targets that are not their position's first come last."""
        by_row, order = self._positions.sort(stable=True)
        repeated = torch.zeros_like(by_row, dtype=torch.bool)
        repeated[1:] = by_row[1:] == by_row[:-1]
        further = repeated.nonzero()[:, 0]
        self._first -= len(further)
        self.order = torch.cat([order[~repeated], order[further]]) if len(further) else order
        self._positions = self._positions[self.order]

    @classmethod
    def of(cls, hidden: Tensor, positions: Tensor, options: HeadOptions) -> "HiddenGradient":
        """With what is spared by default, or half of the budget if that is less."""
        spare = 2**28 if hidden.is_cuda else 2**24
        budget = options.memory_budget
        return cls(hidden, positions, spare=spare if budget is None else min(spare, budget // 2))

    def bands(self, targets: int) -> Iterator[slice]:
        """Slices of at most `targets` targets, for `accumulator`."""
        yield from cut(self._first, targets)
        yield from cut(len(self._positions), targets, start=self._first)

    def accumulator(self, band: slice) -> Tensor:
        """[targets, H], wide and not yet written: where the band's d logp / d hidden is summed up."""
        place = self._memory_of(band)
        return place if place.dtype == self._wide else torch.empty_like(place, dtype=self._wide)

    def store(self, band: slice, values: Tensor) -> None:
        """Stores what was summed up in `accumulator(band)`."""
        place = self._memory_of(band)
        if place.dtype != self._wide:
            place.copy_(values)

    def _memory_of(self, band: slice) -> Tensor:
        if band.start < self._first:
            return self._waiting[band]
        return self._further[band.start - self._first : band.stop - self._first]

    def finish(self, factors: Tensor, piece: int) -> Tensor:
        """The gradient: each target times its factor, [N] in `order`, at its position; `piece` targets at once.

        Uses up what waits.
        """
        if self._beside:
            gradient = torch.zeros(self._shape, dtype=self._dtype, device=factors.device)
            first = 0
        else:
            gradient, first = self._waiting, self._first
            self._move(gradient, factors, piece)
        for targets in cut(len(self._positions), piece, start=first):
            # At most two targets read a position in our layouts, so that on a GPU too the sum has one result.
            gradient.index_add_(0, self._positions[targets], self._weighted(targets, factors))
        del self._waiting, self._further  # memory that the weight's gradient can use
        return gradient

    def _move(self, gradient: Tensor, factors: Tensor, piece: int) -> None:
        """Step 3, for the first target of each position; positions without a target become zero."""
        end = len(gradient)
        begins = self._positions[: self._first : piece].tolist()
        for targets, begin in reversed(list(zip(cut(self._first, piece), begins, strict=True))):
            values = self._weighted(targets, factors)
            gradient[begin:end].zero_()
            gradient.index_copy_(0, self._positions[targets], values)
            end = begin
        gradient[:end].zero_()

    def _weighted(self, targets: slice, factors: Tensor) -> Tensor:
        return (self._memory_of(targets) * factors[targets, None]).to(self._dtype)
