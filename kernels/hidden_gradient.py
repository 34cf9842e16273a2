"""The gradient of hidden states, from when it is computed up to a factor per line until the factors are known.

What a line weighs in the loss depends on the log-probabilities of all lines of its pair, so every line's
d logp / d hidden has to wait for the last one.  It waits in the memory of the gradient that is returned: lines are
taken in the order of their rows, line i is put at row i, which is never behind its own, and in the end all lines move
to their rows, from the last to the first.  Where a row predicts twice (shared prompts), its further lines wait
beside.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_plugins.interfaces import HeadOptions
from orpo_plugins.kernels.tiling import blank, cut


class HiddenGradient:
    """[M, H], in the dtype of the hidden states."""

    def __init__(self, hidden: Tensor, rows: Tensor, *, spare: int) -> None:
        """`rows` [N]: the row of `hidden` [M, H] that each line reads.

        Up to `spare` bytes, 16-bit gradients wait in fp32 beside the returned memory, so that they are rounded once
        and not twice, and all gradients on a GPU, since the order of the rows would have to be waited for.
        """
        self._shape, self._dtype = hidden.shape, hidden.dtype
        self._wide = wide = torch.promote_types(hidden.dtype, torch.float32)
        aside = hidden.dtype != wide or hidden.is_cuda
        self._beside = aside and len(rows) * hidden.shape[1] * wide.itemsize <= spare
        self.order: Tensor | None = None
        """[N]: the lines in the order in which they have to be taken; None for any."""
        self._rows, self._first = rows, len(rows)
        if self._beside:
            self._waiting = blank((len(rows), hidden.shape[1]), hidden, wide)
        else:
            self._sort_lines()
            self._waiting = blank(tuple(hidden.shape), hidden)
        self._further = blank((len(rows) - self._first, hidden.shape[1]), hidden)

    def _sort_lines(self) -> None:
        """By row; lines that are not their row's first come last."""
        by_row, order = self._rows.sort(stable=True)
        repeated = torch.zeros_like(by_row, dtype=torch.bool)
        repeated[1:] = by_row[1:] == by_row[:-1]
        further = repeated.nonzero()[:, 0]
        self._first -= len(further)
        self.order = torch.cat([order[~repeated], order[further]]) if len(further) else order
        self._rows = self._rows[self.order]

    @classmethod
    def of(cls, hidden: Tensor, rows: Tensor, options: HeadOptions) -> "HiddenGradient":
        """With what is spared by default, or half of the budget if that is less."""
        spare = 2**28 if hidden.is_cuda else 2**24
        budget = options.memory_budget
        return cls(hidden, rows, spare=spare if budget is None else min(spare, budget // 2))

    def bands(self, lines: int) -> Iterator[slice]:
        """Slices of at most `lines` lines, for `accumulator`."""
        yield from cut(self._first, lines)
        yield from cut(len(self._rows), lines, start=self._first)

    def accumulator(self, band: slice) -> Tensor:
        """[lines, H], wide and not yet written: where the band's d logp / d hidden is summed up."""
        place = self._place(band)
        return place if place.dtype == self._wide else torch.empty_like(place, dtype=self._wide)

    def put(self, band: slice, values: Tensor) -> None:
        """Takes what was summed up in `accumulator(band)`."""
        place = self._place(band)
        if place.dtype != self._wide:
            place.copy_(values)

    def _place(self, band: slice) -> Tensor:
        if band.start < self._first:
            return self._waiting[band]
        return self._further[band.start - self._first : band.stop - self._first]

    def finish(self, factors: Tensor, piece: int) -> Tensor:
        """The gradient: each line times its factor, [N] in `order`, at its row; `piece` lines at once.

        Uses up what waits.
        """
        if self._beside:
            gradient = torch.zeros(self._shape, dtype=self._dtype, device=factors.device)
            first = 0
        else:
            gradient, first = self._waiting, self._first
            self._move(gradient, factors, piece)
        for lines in cut(len(self._rows), piece, start=first):
            # Two lines read a row at most in our layouts, so that the sum does not depend on their order on a GPU.
            gradient.index_add_(0, self._rows[lines], self._weighted(lines, factors))
        del self._waiting, self._further  # memory that the weight's gradient can use
        return gradient

    def _move(self, gradient: Tensor, factors: Tensor, piece: int) -> None:
        """Moves the first lines of `gradient` to their rows, times their factors, and fills the rest with zeros."""
        end = len(gradient)
        begins = self._rows[: self._first : piece].tolist()
        for lines, begin in reversed(list(zip(cut(self._first, piece), begins, strict=True))):
            values = self._weighted(lines, factors)
            gradient[begin:end].zero_()
            gradient.index_copy_(0, self._rows[lines], values)
            end = begin
        gradient[:end].zero_()

    def _weighted(self, lines: slice, factors: Tensor) -> Tensor:
        return (self._place(lines) * factors[lines, None]).to(self._dtype)
