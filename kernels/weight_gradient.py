"""The gradients of the output matrix and its bias, each part of them written once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_plugins.kernels.operands import Operands
from orpo_plugins.kernels.products import Blocks, in_blocks, times_transposed
from orpo_plugins.kernels.scan import Scan
from orpo_plugins.kernels.tile_steps import put
from orpo_plugins.kernels.tiling import cut


class WeightGradient:
    """d weight [V, H] and d bias [V] of a scan whose lines weigh w [N] in the loss."""

    def __init__(self, inputs: Operands, scan: Scan, w: Tensor, *, need_weight: bool, need_bias: bool) -> None:
        self._inputs, self._scan = inputs, scan
        self._coefficients = (w * -inputs.transform.derivative).div_(scan.total)
        self._at_target = -scan.others if scan.target_slope is None else -scan.others * scan.target_slope
        weight, count = inputs.weight, len(inputs.rows)
        make = torch.empty_like if count else torch.zeros_like
        self.weight = make(weight) if need_weight else None
        self.bias = make(weight[:, 0]) if need_bias else None

    @classmethod
    def compute(
        cls, inputs: Operands, scan: Scan, w: Tensor, *, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both; None where not asked for.  Uses up the tiles that the scan kept."""
        if not need_weight and not need_bias:
            return None, None
        gradient = cls(inputs, scan, w, need_weight=need_weight, need_bias=need_bias)
        done = scan.kept.columns[-1].stop if scan.kept.columns else 0
        gradient._from_kept_tiles()
        if len(inputs.rows):
            for strip in cut(len(inputs.weight), inputs.tiling.strip, start=done):
                gradient._strip(strip)
        return gradient.weight, gradient.bias

    def _from_kept_tiles(self) -> None:
        inputs, kept = self._inputs, self._scan.kept
        if not kept.columns:
            return
        rows = inputs.gather(slice(0, len(inputs.rows)))
        for lines in cut(len(rows), inputs.tiling.piece):
            rows[lines] *= self._coefficients[lines, None]
        for_weight = in_blocks(rows.T)
        for columns, tile in self._kept_tiles():
            if self.weight is not None:
                times_transposed(tile, for_weight, self.weight[columns])
            if self.bias is not None:
                self.bias[columns] = tile.to(inputs.wide) @ self._coefficients
        kept.tiles.clear()

    def _kept_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, tile [columns, lines]) with all tiles at the final reference."""
        kept = self._scan.kept
        for columns, tile, reference in zip(kept.columns, kept.tiles, kept.references, strict=True):
            tile *= torch.exp2(reference - self._scan.reference)[:, None].to(tile.dtype)
            put(tile, 1, self._inputs.tokens - columns.start, self._at_target)
            yield columns, tile.T

    def _strip(self, strip: slice) -> None:
        """Some vocabulary entries, over all lines, with their tiles computed again."""
        inputs, count = self._inputs, len(self._inputs.rows)
        weight, bias = (self._sums(out, strip) for out in (self.weight, self.bias))
        for lines in cut(count, inputs.tiling.block):
            hidden = inputs.gather(lines)
            for_logits, for_weight = in_blocks(hidden), in_blocks(hidden.T)
            for columns in self._tiles(strip):
                tile = self._again(columns, lines, for_logits)
                here = slice(columns.start - strip.start, columns.stop - strip.start)
                if weight is not None:
                    _add(weight[here], times_transposed(tile, for_weight), first=lines.start == 0)
                if bias is not None:
                    _add(bias[here], tile.sum(1, dtype=inputs.wide), first=lines.start == 0)
                del tile
        for out, sums in ((self.weight, weight), (self.bias, bias)):
            if out is not None and sums is not None and sums.dtype != out.dtype:
                out[strip] = sums

    def _tiles(self, strip: slice) -> Iterator[slice]:
        """Parts of the scan's tiles, none of which lies in two of them."""
        for tile in cut(strip.stop, self._inputs.tiling.columns, start=strip.start):
            yield from cut(tile.stop, self._inputs.tiling.width, start=tile.start)

    def _sums(self, out: Tensor | None, strip: slice) -> Tensor | None:
        """Where a part of `out` is summed up: itself, unless several sums would be rounded to 16 bits."""
        if out is None:
            return None
        once = len(self._inputs.rows) <= self._inputs.tiling.block
        if once or out.dtype == self._inputs.wide:
            return out[strip]
        return torch.empty_like(out[strip], dtype=self._inputs.wide)

    def _again(self, columns: slice, lines: slice, hidden: Tensor | Blocks) -> Tensor:
        """A tile [columns, lines], computed a second time; its lines scaled before anything is rounded to 16 bits."""
        # Transposed, because then both this product and the one with the rows read their operands as they lie.
        inputs, reference = self._inputs, self._scan.reference[lines]
        weight, bias = inputs.tile_of_weight(columns)
        # The scan's own: a term that is rounded otherwise than in the sum that divides it is not a probability.
        center = self._scan.centers[columns.start // inputs.tiling.columns][lines].float() if inputs.centered else None
        raw = inputs.raw(weight, hidden, None if center is None else center[None, :])
        out = inputs.like(raw)
        tile = inputs.tile(raw, center, bias, lines, columns)
        inputs.steps.gradient(tile, reference, self._at_target[lines], self._coefficients[lines], out)
        return out


def _add(sums: Tensor, product: Tensor, *, first: bool) -> None:
    if first:
        sums.copy_(product)
    else:
        sums.add_(product)
