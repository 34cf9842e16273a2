"""The pass over all tiles of logits that every call needs: log-probabilities, and d logp / d hidden.

Symbols, for one target t with hidden state h, token y and base-2 logits l [V]:

    m = running_max          the largest logit so far, rounded up to an integer
    e_v = 2^(l_v - m)        exp_logits of a tile, 0 at v = y
    s = exp_sum              sum of e over the vocabulary without y
    z = normalizer           s + 2^(l_y - m)
    J_v                      slope of the soft-cap at v; 1 without one

Steps, for one block of targets after the other:

    1. target logits l_y by dot products; m starts at them, s at 0
    2. for each tile of the vocabulary
         products = hidden @ weight[tile].T                   matrix product 1
         m' = max(m, ceil(max l)); s = s * 2^(m - m') + sum(e)
         expected = expected * 2^(m - m') + (e * J) @ weight[tile]   matrix product 2, where hidden needs a gradient
    3. d logp / d hidden = (1 - p_y) * J_y * weight[y] - expected / z, with 1 - p_y = s / z
    4. logp = -log(1 + s / 2^(l_y - m))
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_plugins.kernels.hidden_gradient import HiddenGradient
from orpo_plugins.kernels.operands import Operands
from orpo_plugins.kernels.products import fresh_memory, in_blocks
from orpo_plugins.kernels.tile_steps import OnlineSoftmax
from orpo_plugins.kernels.tiling import cut


@dataclass(kw_only=True, eq=False)
class KeptTiles:
    """exp_logits * slope of the first tiles of the vocabulary, zero at the targets' tokens."""

    columns: list[slice]
    tiles: list[Tensor]
    """[N, columns] each, working dtype."""
    running_maxima: list[Tensor]
    """[N]: the running maximum with which each tile was made."""

    @classmethod
    def room_for(cls, columns: list[slice], inputs: Operands) -> "KeptTiles":
        """Memory for some tiles."""
        count, width = len(inputs.positions), columns[-1].stop if columns else 0
        memory = fresh_memory((count * width,), inputs.weight, inputs.dtype)
        return cls(
            columns=columns,
            tiles=[
                memory[count * tile.start : count * tile.stop].view(count, tile.stop - tile.start) for tile in columns
            ],
            running_maxima=[memory.new_empty(count, dtype=inputs.wide) for _ in columns],
        )


@dataclass(kw_only=True, eq=False)
class Scan:
    """What the scan leaves behind; [N] and fp32 or fp64."""

    logps: Tensor
    running_max: Tensor
    """Integers r for which the sum of 2^(logit - r) lies in [0.5, 1)."""
    normalizer: Tensor
    """That sum, target included."""
    exp_sum: Tensor
    """That sum without the target, so that exp_sum / normalizer = 1 - p[token]."""
    target_slope: Tensor | None
    """tanh's slope at the target logit, with a soft-cap."""
    logit_means: Tensor | None
    centers: list[Tensor]
    """[N] each: `Operands.center` of every tile, where the tile may have to be computed again."""
    kept: KeptTiles


def scan(inputs: Operands, gradient: HiddenGradient | None, *, need_means: bool, need_weight: bool) -> Scan:
    """Fills `gradient` with d logp / d hidden up to `Transform.derivative`, where it is asked for."""
    target_logit, target_slope = inputs.target_logits()
    running = OnlineSoftmax(
        running_max=target_logit.ceil(),
        exp_sum=torch.zeros_like(target_logit),
        logit_sum=torch.zeros_like(target_logit) if need_means else None,
    )
    tiles = list(cut(len(inputs.weight), inputs.tiling.columns))
    kept = KeptTiles.room_for(tiles[: inputs.tiling.kept], inputs)
    recompute = need_weight and inputs.centered and len(kept.tiles) < len(tiles)
    centers = [torch.empty_like(target_logit, dtype=inputs.dtype) for _ in tiles] if recompute else []
    most = inputs.tiling.targets
    for targets in cut(len(inputs.positions), most) if gradient is None else gradient.bands(most):
        hidden = inputs.gather(targets)
        expected = None if gradient is None else gradient.accumulator(targets)
        for index, columns in enumerate(tiles):
            _scan_tile(inputs, index, columns, targets, hidden, running.of(targets), kept, centers, expected)
        if gradient is not None and expected is not None:
            for part in cut(len(hidden), inputs.tiling.piece):
                piece = slice(targets.start + part.start, targets.start + part.stop)
                _finish_hidden(inputs, piece, target_logit, target_slope, running, expected[part])
            gradient.store(targets, expected)
        del hidden, expected  # before the next are made, not after
    return _finish(inputs, target_logit, target_slope, running, centers, kept)


def _scan_tile(
    inputs: Operands,
    index: int,
    columns: slice,
    targets: slice,
    hidden: Tensor,
    running: OnlineSoftmax,
    kept: KeptTiles,
    centers: list[Tensor],
    expected: Tensor | None,
) -> None:
    """Step 2: takes one tile into `running`, and adds its exp_logits * slope times weight to `expected`."""
    weight, bias = inputs.tile_of_weight(columns)
    center = inputs.center(running.running_max)
    if centers and center is not None:
        centers[index][targets] = center
    products = inputs.products(hidden, in_blocks(weight, uses=1), None if center is None else center[:, None])
    out = None
    if index < len(kept.tiles):
        out = kept.tiles[index][targets]
    elif expected is not None:
        out = inputs.like(products)
    shrink = inputs.steps.scan(inputs.tile(products, center, bias, targets, columns), running, out)
    if index < len(kept.tiles):
        kept.running_maxima[index][targets] = running.running_max
    if expected is not None and out is not None:
        product = inputs.product(out, weight.T)
        if index == 0:
            expected.copy_(product)
        else:
            torch.addcmul(product, expected, shrink[:, None], out=expected)


def _finish_hidden(
    inputs: Operands,
    targets: slice,
    target_logit: Tensor,
    target_slope: Tensor | None,
    running: OnlineSoftmax,
    expected: Tensor,
) -> None:
    """Step 3: from `expected` [targets, H] to d logp / d hidden, in place."""
    here = running.of(targets)
    share = here.exp_sum if target_slope is None else here.exp_sum * target_slope[targets]
    normalizer = here.exp_sum + torch.exp2(target_logit[targets] - here.running_max)
    expected.neg_().add_(inputs.target_weights(targets).mul_(share[:, None])).div_(normalizer[:, None])


def _finish(
    inputs: Operands,
    target_logit: Tensor,
    target_slope: Tensor | None,
    running: OnlineSoftmax,
    centers: list[Tensor],
    kept: KeptTiles,
) -> Scan:
    """Step 4."""
    at_target = torch.exp2(target_logit - running.running_max)
    normalizer = running.exp_sum + at_target
    # Equal expressions: the first loses no digits where p > 1/2, the second where `at_target` has vanished.
    likely = -torch.log1p(running.exp_sum / at_target)
    unlikely = (target_logit - running.running_max) * math.log(2) - normalizer.log()
    _, exponent = torch.frexp(normalizer)
    shift = torch.exp2(-exponent.to(inputs.wide))
    means = running.logit_sum
    return Scan(
        logps=torch.where(running.exp_sum < at_target, likely, unlikely),
        running_max=running.running_max + exponent,
        normalizer=normalizer * shift,
        exp_sum=running.exp_sum * shift,
        target_slope=target_slope,
        logit_means=None if means is None else means * (inputs.transform.factor * math.log(2) / len(inputs.weight)),
        centers=centers,
        kept=kept,
    )
