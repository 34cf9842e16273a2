"""The pass over all tiles of logits that every call needs: log-probabilities, and d logp / d hidden.

Symbols, for one target t with hidden state h [H], token y and base-2 logits l [V]:

    m = running_max      the largest logit so far, rounded up to an integer
    e_v = 2^(l_v - m)    exp_logits of a tile, 0 at v = y
    s = exp_sum          sum of e over the vocabulary without y
    2^(l_y - m)          exp_target
    z = normalizer       s + exp_target, so that p_v = e_v / z and 1 - p_y = s / z
    J_v                  slope of the soft-cap at v; 1 without one

Steps, for one band of targets after the other:

    1. target logits l_y by dot products; m starts at them, s at 0
    2. for each tile of the vocabulary
         products = hidden @ weight[tile].T                          matrix product 1
         m' = max(m, ceil(max l)); rescale = 2^(m - m'); s = s * rescale + sum(e)
         expected = expected * rescale + (e * J) @ weight[tile]      matrix product 2, where hidden needs a gradient
    3. d logp / d hidden = (1 - p_y) * J_y * weight[y] - expected / z
    4. logp = log p_y = -log(1 + s / exp_target)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_plugins.kernels.hidden_gradient import HiddenGradient
from orpo_plugins.kernels.operands import Operands
from orpo_plugins.kernels.products import empty_in_huge_pages, in_blocks
from orpo_plugins.kernels.tile_steps import OnlineSoftmax
from orpo_plugins.kernels.tiling import cut


@dataclass(kw_only=True, eq=False)
class KeptTiles:
    """exp_logits * slope of the first tiles of the vocabulary, for all targets; zero at the targets' tokens."""

    columns: list[slice]
    tiles: list[Tensor]
    """[N, columns] each, working dtype."""
    running_maxima: list[Tensor]
    """[N] each: the running maximum with which the tile was made."""

    @classmethod
    def allocate(cls, columns: list[slice], inputs: Operands) -> "KeptTiles":
        """Memory for some tiles."""
        count, widths = len(inputs.positions), [inputs.padded(tile.stop - tile.start) for tile in columns]
        memory = empty_in_huge_pages((count * sum(widths),), inputs.weight, inputs.dtype)
        tiles = torch.split(memory, [count * width for width in widths])
        return cls(
            columns=columns,
            tiles=[
                tile.view(count, width)[:, : taken.stop - taken.start]
                for tile, width, taken in zip(tiles, widths, columns, strict=True)
            ],
            running_maxima=[memory.new_empty(count, dtype=inputs.wide) for _ in columns],
        )


@dataclass(kw_only=True, eq=False)
class ScanResult:
    """What the scan leaves behind; [N] and fp32 or fp64."""

    logps: Tensor
    running_max: Tensor
    """Integers r for which the sum of 2^(logit - r) lies in [0.5, 1)."""
    normalizer: Tensor
    """That sum, target included."""
    exp_sum: Tensor
    """That sum without the target, so that exp_sum / normalizer = 1 - p_y."""
    target_slope: Tensor | None
    """tanh's slope at the target logit, with a soft-cap."""
    logit_means: Tensor | None
    centers: list[Tensor]
    """[N] each: `Operands.center` of every tile, where the tile may have to be computed again."""
    kept: KeptTiles


class Scan:
    """One scan; `run` does all of it."""

    def __init__(self, inputs: Operands, *, need_means: bool, need_weight: bool) -> None:
        self._inputs = inputs
        self._target_logit, self._target_slope = inputs.target_logits()
        self._running = OnlineSoftmax(
            running_max=self._target_logit.ceil(),
            exp_sum=torch.zeros_like(self._target_logit),
            logit_sum=torch.zeros_like(self._target_logit) if need_means else None,
        )
        self._tiles = list(cut(len(inputs.weight), inputs.tiling.columns))
        self._kept = KeptTiles.allocate(self._tiles[: inputs.tiling.kept], inputs)
        recompute = need_weight and inputs.centered and len(self._kept.tiles) < len(self._tiles)
        self._centers = [
            torch.empty_like(self._target_logit, dtype=inputs.dtype) for _ in (self._tiles if recompute else [])
        ]

    def run(self, gradient: HiddenGradient | None) -> ScanResult:
        """Fills `gradient` with d logp / d hidden / `Transform.derivative`, where it is asked for."""
        inputs, most = self._inputs, self._inputs.tiling.targets
        for band in cut(len(inputs.positions), most) if gradient is None else gradient.bands(most):
            hidden = inputs.gather(band)
            expected = None if gradient is None else gradient.accumulator(band)
            for index in range(len(self._tiles)):
                self._tile(index, band, hidden, expected)
            if gradient is not None and expected is not None:
                for part in cut(len(hidden), inputs.tiling.piece):
                    self._finish_hidden(slice(band.start + part.start, band.start + part.stop), expected[part])
                gradient.store(band, expected)
            del hidden, expected  # before the next are made, not after
        return self._result()

    def _tile(self, index: int, band: slice, hidden: Tensor, expected: Tensor | None) -> None:
        """Step 2: takes one tile into the running sums and into `expected` [targets, H]."""
        inputs, kept, columns, running = self._inputs, self._kept, self._tiles[index], self._running.part(band)
        weight, bias = inputs.tile_of_weight(columns)
        center = inputs.center(running.running_max)
        if self._centers and center is not None:
            self._centers[index][band] = center
        products = inputs.products(hidden, in_blocks(weight, uses=1), None if center is None else center[:, None])
        out = None
        if index < len(kept.tiles):
            out = kept.tiles[index][band]
        elif expected is not None:
            out = inputs.like(products)
        rescale = inputs.steps.scan(inputs.tile(products, center, bias, band, columns), running, out)
        if index < len(kept.tiles):
            kept.running_maxima[index][band] = running.running_max
        if expected is not None and out is not None:
            product = inputs.wide_product(out, weight.T)
            if index == 0:
                expected.copy_(product)
            else:
                torch.addcmul(product, expected, rescale[:, None], out=expected)

    def _finish_hidden(self, targets: slice, expected: Tensor) -> None:
        """Step 3: from `expected` [targets, H] to d logp / d hidden, in place."""
        exp_sum, slope = self._running.exp_sum[targets], self._target_slope
        share = exp_sum if slope is None else exp_sum * slope[targets]
        normalizer = exp_sum + self._exp_target(targets)
        expected.neg_().add_(self._inputs.target_weights(targets).mul_(share[:, None])).div_(normalizer[:, None])

    def _exp_target(self, targets: slice) -> Tensor:
        """[targets]: 2^(l_y - m)."""
        exp_target = torch.exp2(self._target_logit[targets] - self._running.running_max[targets])
        # At least the smallest normal number: m may come from y's own product, rounded to bf16 far above l_y, while
        # nothing else is left in s.  Then 0 / 0 would be NaN where p_y is 1.
        return exp_target.clamp_(min=torch.finfo(exp_target.dtype).tiny)

    def _result(self) -> ScanResult:
        """Step 4."""
        running, inputs = self._running, self._inputs
        exp_target = self._exp_target(slice(None))
        normalizer = running.exp_sum + exp_target
        # Equal expressions: the first loses no digits where p > 1/2, the second where exp_target has vanished.
        likely = -torch.log1p(running.exp_sum / exp_target)
        unlikely = (self._target_logit - running.running_max) * math.log(2) - normalizer.log()
        # A maximum for which z lies in [0.5, 1).  With it the entries of tiles are nearly probabilities, and w / z is
        # nearly w: the weight's gradient multiplies nothing that leaves the range of fp16.
        _, exponent = torch.frexp(normalizer)
        shift = torch.exp2(-exponent.to(inputs.wide))
        per_entry = inputs.transform.factor * math.log(2) / len(inputs.weight)
        return ScanResult(
            logps=torch.where(running.exp_sum < exp_target, likely, unlikely),
            running_max=running.running_max + exponent,
            normalizer=normalizer * shift,
            exp_sum=running.exp_sum * shift,
            target_slope=self._target_slope,
            logit_means=None if running.logit_sum is None else running.logit_sum * per_entry,
            centers=self._centers,
            kept=self._kept,
        )
