"""The gradient of hidden states: first d logp / d hidden of each target, later times the target's factor.

The factor is w_t = d loss / d logp_t.  It depends on the log-probabilities of all targets of its pair, so that
d logp / d hidden of each target has to wait until they are known.  It waits in the memory of the gradient that is
returned:

    1. sort the targets by their positions
    2. store target i in row i, which never lies behind the target's own position; where a position has two targets
       (the end of a shared prompt), the second one waits in memory of its own
    3. once all factors are known, move every target to its position, from the last to the first, times its factor

        row       0 1 2 3 4 5          waiting    a b c . . .
        target    . a . b . c    ->    moved      . a . b . c
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_plugins.hooks.types import HeadOptions
from orpo_plugins.kernels.tiling import cut

_SPARE_ON_GPU, _SPARE_ON_CPU = 2**28, 2**24
"""Bytes beside the returned gradient, without a budget: little against all that training needs."""


class HiddenGradient:
    """[M, H], in the dtype of the hidden states."""

    def __init__(self, hidden: Tensor, positions: Tensor, *, spare: int) -> None:
        """`positions` [N]: the row of `hidden` [M, H] that each target reads.

        Two kinds of gradients wait beside the returned memory, where that takes at most `spare` bytes.  16-bit
        gradients wait in fp32, so that they are rounded once and not twice.  All gradients do on a GPU, because the
        host would have to wait for the order of the positions.
        """
        self._shape, self._dtype = hidden.shape, hidden.dtype
        self._wide = wide = torch.promote_types(hidden.dtype, torch.float32)
        width, to_beside = hidden.shape[1], hidden.dtype != wide or hidden.is_cuda
        self._beside = to_beside and len(positions) * width * wide.itemsize <= spare
        self.order: Tensor | None = None
        """[N]: the targets in the order in which they have to be read; None for any."""
        self._positions, self._first = positions, len(positions)
        if self._beside:
            self._waiting = hidden.new_empty(len(positions), width, dtype=wide)
        else:
            self._sort_targets()
            self._waiting = hidden.new_empty(hidden.shape)
        self._second = hidden.new_empty(len(positions) - self._first, width)

    def _sort_targets(self) -> None:
        """Step 1.  The first targets of all positions come first, `_first` of them, then the second ones."""
        by_position, order = self._positions.sort(stable=True)
        repeated = torch.zeros_like(by_position, dtype=torch.bool)
        repeated[1:] = by_position[1:] == by_position[:-1]
        second = repeated.nonzero()[:, 0]
        self._first -= len(second)
        self.order = torch.cat([order[~repeated], order[second]]) if len(second) else order
        self._positions = self._positions[self.order]

    @classmethod
    def from_options(cls, hidden: Tensor, positions: Tensor, options: HeadOptions) -> "HiddenGradient":
        """With what is spared by default, or half of the budget if that is less."""
        spare = _SPARE_ON_GPU if hidden.is_cuda else _SPARE_ON_CPU
        budget = options.memory_budget
        return cls(hidden, positions, spare=spare if budget is None else min(spare, budget // 2))

    def bands(self, targets: int) -> Iterator[slice]:
        """Slices of at most `targets` targets, for `accumulator`."""
        yield from cut(self._first, targets)
        yield from cut(len(self._positions), targets, start=self._first)

    def accumulator(self, band: slice) -> Tensor:
        """[targets, H], fp32 or fp64 and not yet written: where the band's d logp / d hidden is summed up."""
        memory = self._memory_of(band)
        return memory if memory.dtype == self._wide else torch.empty_like(memory, dtype=self._wide)

    def store(self, band: slice, values: Tensor) -> None:
        """Step 2: stores what was summed up in `accumulator(band)`."""
        memory = self._memory_of(band)
        if memory.dtype != self._wide:
            memory.copy_(values)

    def _memory_of(self, band: slice) -> Tensor:
        if band.start < self._first:
            return self._waiting[band]
        return self._second[band.start - self._first : band.stop - self._first]

    def finish(self, factors: Tensor, piece: int) -> Tensor:
        """Step 3: the gradient, from factors [N] in `order`; `piece` targets at once.  Uses up what waits."""
        if self._beside:
            gradient = torch.zeros(self._shape, dtype=self._dtype, device=factors.device)
            first = 0
        else:
            gradient, first = self._waiting, self._first
            self._move(gradient, factors, piece)
        for targets in cut(len(self._positions), piece, start=first):
            # At most two targets with a weight read a position in our layouts: on a GPU too, the sum has one result.
            gradient.index_add_(0, self._positions[targets], self._weighted(targets, factors))
        del self._waiting, self._second  # memory that the weight's gradient can use
        return gradient

    def _move(self, gradient: Tensor, factors: Tensor, piece: int) -> None:
        """Step 3, for the first target of each position; positions without a target become zero."""
        end = len(gradient)
        begins = self._positions[: self._first : piece].tolist()
        for targets, begin in reversed(list(zip(cut(self._first, piece), begins, strict=True))):
            values = self._weighted(targets, factors)
            # What still waits lies before `begin`, because row i never lies behind the position of target i.
            gradient[begin:end].zero_()
            gradient.index_copy_(0, self._positions[targets], values)
            end = begin
        gradient[:end].zero_()

    def _weighted(self, targets: slice, factors: Tensor) -> Tensor:
        return (self._memory_of(targets) * factors[targets, None]).to(self._dtype)
