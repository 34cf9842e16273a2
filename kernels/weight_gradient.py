"""The gradients of the output matrix and its bias, each part of them written once.

With the symbols of `scan`, and w_t = d loss / d logp_t:

    d weight[v] = sum over t of -w_t * J_tv * (p_tv - [v = y_t]) * h_t

Steps:

    1. coefficients c_t = -w_t / z_t.  p = e / z, so that e * c stands for -w * p, and at v = y the entry -s * c
       stands for w * (1 - p_y): only the [N] numbers, never a matrix of the vocabulary's width, are multiplied by w
    2. for the tiles that the scan has kept: bring each to the final running maximum, write the entries at the targets'
       tokens, and multiply: tile.T @ (c * hidden)                        matrix product 3
    3. for every other strip of the vocabulary: compute its tiles again, transposed, with c in them before anything is
       rounded to 16 bits, and sum tile @ hidden over the targets         matrix products 3 and 4
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_plugins.kernels.operands import Operands
from orpo_plugins.kernels.products import Blocks, in_blocks, times_transposed
from orpo_plugins.kernels.scan import ScanResult
from orpo_plugins.kernels.tile_steps import scatter_targets
from orpo_plugins.kernels.tiling import cut


class WeightGradient:
    """d weight [V, H] and d bias [V] of a scan whose targets have w [N]."""

    def __init__(self, inputs: Operands, scan: ScanResult, w: Tensor, *, need_weight: bool, need_bias: bool) -> None:
        self._inputs, self._scan = inputs, scan
        # Step 1, with the constant factor of J in the coefficients.
        self._coefficients = (w * -inputs.transform.derivative).div_(scan.normalizer)
        self._target_entry = -scan.exp_sum if scan.target_slope is None else -scan.exp_sum * scan.target_slope
        weight, count = inputs.weight, len(inputs.positions)
        make = torch.empty_like if count else torch.zeros_like
        self.weight = make(weight) if need_weight else None
        self.bias = make(weight[:, 0]) if need_bias else None

    @classmethod
    def compute(
        cls, inputs: Operands, scan: ScanResult, w: Tensor, *, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both; None where not asked for.  Uses up the tiles that the scan kept."""
        if not need_weight and not need_bias:
            return None, None
        gradient = cls(inputs, scan, w, need_weight=need_weight, need_bias=need_bias)
        done = scan.kept.columns[-1].stop if scan.kept.columns else 0
        gradient._from_kept_tiles()
        if len(inputs.positions):
            for strip in cut(len(inputs.weight), inputs.tiling.strip, start=done):
                gradient._strip(strip)
        return gradient.weight, gradient.bias

    def _from_kept_tiles(self) -> None:
        """Step 2."""
        inputs, kept = self._inputs, self._scan.kept
        if not kept.columns:
            return
        hidden = inputs.gather(slice(0, len(inputs.positions)))
        for targets in cut(len(hidden), inputs.tiling.piece):
            hidden[targets] *= self._coefficients[targets, None]
        for_weight = in_blocks(hidden.T)
        for columns, tile in self._kept_tiles():
            if self.weight is not None:
                times_transposed(tile, for_weight, self.weight[columns])
            if self.bias is not None:
                self.bias[columns] = tile.to(inputs.wide) @ self._coefficients
        kept.tiles.clear()

    def _kept_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, tile [columns, targets]) with all tiles at the final running maximum."""
        kept = self._scan.kept
        for columns, tile, running_max in zip(kept.columns, kept.tiles, kept.running_maxima, strict=True):
            tile *= torch.exp2(running_max - self._scan.running_max)[:, None].to(tile.dtype)
            scatter_targets(tile, 1, self._inputs.token_ids - columns.start, self._target_entry)
            yield columns, tile.T

    def _strip(self, strip: slice) -> None:
        """Step 3, for one strip."""
        inputs, count = self._inputs, len(self._inputs.positions)
        weight, bias = (self._sums(out, strip) for out in (self.weight, self.bias))
        for targets in cut(count, inputs.tiling.grad_targets):
            hidden = inputs.gather(targets)
            for_logits, for_weight = in_blocks(hidden), in_blocks(hidden.T)
            for columns in self._tiles(strip):
                tile = self._recomputed_tile(columns, targets, for_logits)
                here = slice(columns.start - strip.start, columns.stop - strip.start)
                if weight is not None:
                    _add(weight[here], times_transposed(tile, for_weight), first=targets.start == 0)
                if bias is not None:
                    _add(bias[here], tile.sum(1, dtype=inputs.wide), first=targets.start == 0)
                del tile
        for out, sums in ((self.weight, weight), (self.bias, bias)):
            if out is not None and sums is not None and sums.dtype != out.dtype:
                out[strip] = sums

    def _tiles(self, strip: slice) -> Iterator[slice]:
        """Columns of the tiles of a strip, each inside one tile of the scan, since every tile has its own center."""
        for tile in cut(strip.stop, self._inputs.tiling.columns, start=strip.start):
            yield from cut(tile.stop, self._inputs.tiling.grad_columns, start=tile.start)

    def _sums(self, out: Tensor | None, strip: slice) -> Tensor | None:
        """Where a part of `out` is summed up: itself, unless several sums would be rounded to 16 bits."""
        if out is None:
            return None
        once = len(self._inputs.positions) <= self._inputs.tiling.grad_targets
        if once or out.dtype == self._inputs.wide:
            return out[strip]
        return torch.empty_like(out[strip], dtype=self._inputs.wide)

    def _recomputed_tile(self, columns: slice, targets: slice, hidden: Tensor | Blocks) -> Tensor:
        """A tile [columns, targets], computed a second time, times the coefficients."""
        # Transposed, so that this product and the one with the hidden states read their operands as they are stored.
        inputs, scan = self._inputs, self._scan
        weight, bias = inputs.tile_of_weight(columns)
        # The scan's own center: products that are rounded otherwise than in the normalizer give no probabilities.
        center = scan.centers[columns.start // inputs.tiling.columns][targets].float() if inputs.centered else None
        products = inputs.products(weight, hidden, None if center is None else center[None, :])
        out = inputs.like(products)
        tile = inputs.tile(products, center, bias, targets, columns)
        per_target = (scan.running_max[targets], self._target_entry[targets], self._coefficients[targets])
        inputs.steps.gradient(tile, *per_target, out)
        return out


def _add(sums: Tensor, product: Tensor, *, first: bool) -> None:
    if first:
        sums.copy_(product)
    else:
        sums.add_(product)
