"""The pass over all tiles that every call needs: log-probabilities, and d logp / d hidden."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_plugins.kernels.hidden_gradient import HiddenGradient
from orpo_plugins.kernels.operands import Operands
from orpo_plugins.kernels.products import fresh_memory, in_blocks
from orpo_plugins.kernels.tile_steps import Running
from orpo_plugins.kernels.tiling import cut


@dataclass(kw_only=True, eq=False)
class Kept:
    """E * slope of the first tiles of the vocabulary, zero at targets."""

    columns: list[slice]
    tiles: list[Tensor]
    """[N, columns] each, working dtype."""
    references: list[Tensor]
    """[N]: the reference at which each tile was made."""

    @classmethod
    def room_for(cls, columns: list[slice], inputs: Operands) -> "Kept":
        """Memory for some tiles."""
        count, total = len(inputs.rows), columns[-1].stop if columns else 0
        memory = fresh_memory((count * total,), inputs.weight, inputs.dtype)
        return cls(
            columns=columns,
            tiles=[
                memory[count * tile.start : count * tile.stop].view(count, tile.stop - tile.start) for tile in columns
            ],
            references=[memory.new_empty(count, dtype=inputs.wide) for _ in columns],
        )


@dataclass(kw_only=True, eq=False)
class Scan:
    """What the scan leaves behind; [N] and fp32 or fp64."""

    logps: Tensor
    reference: Tensor
    """Integers r for which the sum of 2^(logit - r) lies in [0.5, 1)."""
    total: Tensor
    """That sum, target included."""
    others: Tensor
    """That sum without the target, so that others / total = 1 - p[token]."""
    target_slope: Tensor | None
    """tanh's slope at the target logit, with a soft-cap."""
    logit_means: Tensor | None
    centers: list[Tensor]
    """[N] each: `Operands.center` of every tile, where it may have to be computed again."""
    kept: Kept


def scan(inputs: Operands, gradient: HiddenGradient | None, *, need_means: bool, need_weight: bool) -> Scan:
    """Fills `gradient` with d logp / d hidden up to `Transform.derivative`, where it is asked for."""
    target, target_slope = inputs.target_logits()
    running = Running(
        reference=target.ceil(),
        others=torch.zeros_like(target),
        raw_sum=torch.zeros_like(target) if need_means else None,
    )
    tiles = list(cut(len(inputs.weight), inputs.tiling.columns))
    kept = Kept.room_for(tiles[: inputs.tiling.kept], inputs)
    again = need_weight and inputs.centered and len(kept.tiles) < len(tiles)
    centers = [torch.empty_like(target, dtype=inputs.dtype) for _ in tiles] if again else []
    most = inputs.tiling.lines
    for lines in cut(len(inputs.rows), most) if gradient is None else gradient.bands(most):
        hidden = inputs.gather(lines)
        expected = None if gradient is None else gradient.accumulator(lines)
        for index, columns in enumerate(tiles):
            _scan_tile(inputs, index, columns, lines, hidden, running.of(lines), kept, centers, expected)
        if gradient is not None and expected is not None:
            for part in cut(len(hidden), inputs.tiling.piece):
                piece = slice(lines.start + part.start, lines.start + part.stop)
                _finish_hidden(inputs, piece, target, target_slope, running, expected[part])
            gradient.put(lines, expected)
        del hidden, expected  # before the next are made, not after
    return _finish(inputs, target, target_slope, running, centers, kept)


def _scan_tile(
    inputs: Operands,
    index: int,
    columns: slice,
    lines: slice,
    hidden: Tensor,
    running: Running,
    kept: Kept,
    centers: list[Tensor],
    expected: Tensor | None,
) -> None:
    """Takes one tile into `running`, and adds its E * slope times weight, unscaled, to `expected`."""
    weight, bias = inputs.tile_of_weight(columns)
    center = inputs.center(running.reference)
    if centers and center is not None:
        centers[index][lines] = center
    raw = inputs.raw(hidden, in_blocks(weight, uses=1), None if center is None else center[:, None])
    out = None
    if index < len(kept.tiles):
        out = kept.tiles[index][lines]
    elif expected is not None:
        out = inputs.like(raw)
    shrink = inputs.steps.scan(inputs.tile(raw, center, bias, lines, columns), running, out)
    if index < len(kept.tiles):
        kept.references[index][lines] = running.reference
    if expected is not None and out is not None:
        product = inputs.product(out, weight.T)
        if index == 0:
            expected.copy_(product)
        else:
            torch.addcmul(product, expected, shrink[:, None], out=expected)


def _finish_hidden(
    inputs: Operands, lines: slice, target: Tensor, target_slope: Tensor | None, running: Running, rows: Tensor
) -> None:
    """From sum(E * slope) @ weight to ((1 - p[token]) * slope[token] * weight[token] - that / sum), in place."""
    here = running.of(lines)
    share = here.others if target_slope is None else here.others * target_slope[lines]
    total = here.others + torch.exp2(target[lines] - here.reference)
    rows.neg_().add_(inputs.target_weights(lines).mul_(share[:, None])).div_(total[:, None])


def _finish(
    inputs: Operands,
    target: Tensor,
    target_slope: Tensor | None,
    running: Running,
    centers: list[Tensor],
    kept: Kept,
) -> Scan:
    at_target = torch.exp2(target - running.reference)
    total = running.others + at_target
    # Equal expressions: the first loses no digits where p > 1/2, the second where `at_target` has vanished.
    likely = -torch.log1p(running.others / at_target)
    unlikely = (target - running.reference) * math.log(2) - total.log()
    _, exponent = torch.frexp(total)
    shift = torch.exp2(-exponent.to(inputs.wide))
    means = running.raw_sum
    return Scan(
        logps=torch.where(running.others < at_target, likely, unlikely),
        reference=running.reference + exponent,
        total=total * shift,
        others=running.others * shift,
        target_slope=target_slope,
        logit_means=None if means is None else means * (inputs.transform.factor * math.log(2) / len(inputs.weight)),
        centers=centers,
        kept=kept,
    )
