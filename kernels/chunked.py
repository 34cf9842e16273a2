"""The fused head: the objective and its gradients in the forward, from one tile of logits at a time.

With l = softcap(scale * (hidden @ weight.T + bias)), J = dl / d(hidden @ weight.T) and p = softmax(l):

    w_t = d loss / d logp_t = -nll_weight_t + (d pair_loss / d mean_logp_s) / n_s
    d loss / d (hidden @ weight.T)[t] = w_t * J_t * (onehot_t - p_t)

Everything that is special about the objective is in the numbers w [N], and these come from autograd on tensors of
size [N] once the log-probabilities are known.  So no matrix of the vocabulary's width is ever scaled by w.

    scan        for each tile: E = 2^(l * log2(e) - reference), others += sum(E), expected += (E * J) @ weight
                afterwards: d hidden = w * ((1 - p[token]) * J[token] * weight[token] - expected / sum)
    d weight    only where asked for, for each tile of the vocabulary: (E * J).T @ (w / sum * hidden), with E either
                kept from the scan (3 matrix products in all) or computed again (4)

Numerics.  The target's own entry is left out of E, and its logit is a dot product in fp32: log p = -log1p(others / e),
so that log p <= 0 holds for every rounding and 1 - p keeps its digits where p is close to 1.  The reference is a
running maximum, rounded up to an integer: moving it multiplies by a power of two, which rounds nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_plugins.errors import BatchError
from orpo_plugins.hookspecs import hookimpl
from orpo_plugins.interfaces import HeadOptions, HeadResult, Kernel, Objective
from orpo_plugins.kernels.products import Blocks, fresh_memory, in_blocks, times_transposed, working_dtype
from orpo_plugins.kernels.reference import combine
from orpo_plugins.objective import at_least_fp32
from orpo_plugins.predictions import Predictions


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """Runs anywhere."""
    return [Kernel(name="chunked", compute=chunked_head)]


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    predictions: Predictions,
    objective: Objective,
    options: HeadOptions,
) -> HeadResult:
    """See `KernelFunction`.

    `memory_budget` buys kept tiles: each byte beyond the working set of a few tiles saves its share of the fourth
    matrix product of a trainable head.  The default is 2.5 times the returned weight gradient for 16-bit dtypes and
    nothing for wider ones, whose tiles take twice the memory for the same saving.  A budget below the working set
    makes the tiles smaller, and the head slower.
    """
    return tiled_head(hidden, weight, bias, predictions, objective, options, EagerSteps())


def tiled_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    predictions: Predictions,
    objective: Objective,
    options: HeadOptions,
    steps: "TileSteps",
) -> HeadResult:
    """The algorithm of this module with the arithmetic on tiles given by `steps`."""
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    if not torch.is_grad_enabled():  # needs_input_grad below does not know about no_grad
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss, nll, logps, means = cast(
        tuple[Tensor, Tensor, Tensor, Tensor | None],
        _TiledHead.apply(hidden, weight, bias, predictions, objective, options, steps),  # type: ignore[no-untyped-call]
    )
    return HeadResult(loss=loss, nll_loss=nll, logps=logps, logit_means=means)


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts to autocast's dtype where it is on, as `torch.nn.Linear` would be; gradients pass through the casts."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    others = [weight] if bias is None else [weight, bias]
    if any(other.dtype != hidden.dtype for other in others):
        found = " and ".join(str(other.dtype) for other in others)
        raise BatchError(
            f"hidden is {hidden.dtype} but {'weight is' if bias is None else 'weight and bias are'} {found}: "
            "cast them to one dtype, or run under torch.autocast"
        )
    return hidden, weight, bias


class _TiledHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        predictions: Predictions,
        objective: Objective,
        options: HeadOptions,
        steps: "TileSteps",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        needs = ctx.needs_input_grad[:3]
        tiling = Tiling.plan(hidden, weight, options, trainable=any(needs[1:]))
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen already
            head = _Head(hidden, weight, bias, predictions.tokens, Transform.of(options), tiling, steps)
            scan = head.scan(need_hidden=needs[0], need_means=options.logit_means)
            loss, nll, means, w = differentiate(scan.logps, predictions, objective, need_w=any(needs))
            w, ctx.unit = in_safe_unit(w, hidden.dtype)
            d_hidden = head.hidden_gradient(scan, w) if needs[0] else None
            ctx.gradients = [d_hidden, *head.weight_gradients(scan, w, need_weight=needs[1], need_bias=needs[2])]
        ctx.mark_non_differentiable(nll, means, *([] if scan.logit_means is None else [scan.logit_means]))
        ctx.set_materialize_grads(False)
        return loss, nll, means, scan.logit_means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        if ctx.gradients is None:
            raise RuntimeError(
                "backward() was called twice on one loss: its gradients were computed in the forward and have been "
                "handed out. Compute the loss again, or add up all that needs it and call backward() once"
            )
        factor = grad_loss if ctx.unit is None else grad_loss * ctx.unit
        gradients, ctx.gradients = ctx.gradients, None
        if factor.is_cuda or float(factor) != 1.0:  # on a GPU the question would take longer than the product
            # In place, since a second d_weight would double the peak; in fp32, since fp16 holds no loss scale.
            gradients = [None if given is None else given.mul_(factor) for given in gradients]
        return *gradients, None, None, None, None


def differentiate(
    logps: Tensor, predictions: Predictions, objective: Objective, *, need_w: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, NLL, mean log-probabilities [2B], w = d loss / d logp [N]), all detached; w is zero if not needed."""
    with torch.set_grad_enabled(need_w):
        leaf = logps.detach().requires_grad_(need_w)
        loss, nll, means = combine(leaf, predictions, objective)
        w = torch.autograd.grad(loss, leaf)[0] if need_w else torch.zeros_like(logps)
    return loss.detach(), nll.detach(), means.detach(), w


def in_safe_unit(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(w / unit, unit), with a unit in which every product with w stays inside fp16; None for 1.

    A token of a long batch weighs 1e-5 and less, below what fp16 holds to full precision.  In the unit chosen the
    absolute weights sum to 32..64: no product w * hidden vanishes, and no sum over tokens exceeds 64 * max |hidden|.
    The unit is a power of two, so nothing is rounded.
    """
    if dtype != torch.float16:
        return w, None
    total = w.abs().sum().clamp(min=64 * torch.finfo(w.dtype).tiny)
    unit = torch.exp2(torch.ceil(torch.log2(total)) - 6)
    return w / unit, unit


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How raw products become logits in base 2: `factor * raw`, or `factor * tanh(inner * raw)` with a soft-cap."""

    factor: float
    inner: float | None

    @classmethod
    def of(cls, options: HeadOptions) -> "Transform":
        """From scale and soft-cap."""
        log2_e = 1 / math.log(2)
        if options.softcap is None:
            return cls(factor=options.logit_scale * log2_e, inner=None)
        return cls(factor=options.softcap * log2_e, inner=options.logit_scale / options.softcap)

    @property
    def derivative(self) -> float:
        """d logit / d raw, in base e, at the origin: what remains of J when tanh's own slope is taken out."""
        return self.factor * (self.inner or 1.0) * math.log(2)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the [N, V] logits are cut."""

    lines: int
    """Lines per tile of the scan."""
    columns: int
    """Vocabulary entries per tile of the scan."""
    block: int
    """Lines that one product of the weight's gradient sums over."""
    kept: int
    """Tiles of the vocabulary whose probabilities are kept from the scan, for all lines."""

    @classmethod
    def plan(cls, hidden: Tensor, weight: Tensor, options: HeadOptions, *, trainable: bool) -> "Tiling":
        """Tiles that stay in a CPU's caches, or fill a GPU; smaller ones where the budget asks; and what it keeps."""
        (count, width), vocabulary = hidden.shape, weight.shape[0]
        itemsize = working_dtype(hidden.dtype, hidden.device).itemsize

        def working_set(lines: int, columns: int) -> int:
            rows = 2 * count if trainable and itemsize == 4 else count  # fp32: once more, cut into blocks
            return lines * columns * (4 + itemsize) + 4 * width * (rows + 2 * lines + columns)

        if hidden.is_cuda:
            lines, columns, narrowest, smallest = 4096, 8192, 4096, 2**21
        else:
            # 16 bits: few partial sums over lines, since each is rounded; wider: wide products, which are faster.
            lines, columns, narrowest, smallest = 1024 // itemsize, 1024, 128 if itemsize == 2 else 1024, 2**16
        budget = options.memory_budget
        while budget is not None and budget < working_set(lines, columns) and lines * columns > smallest:
            lines, columns = (lines // 2, columns) if 2 * lines >= columns else (lines, columns // 2)
            narrowest = max(128, narrowest // 2)
        block = min(lines * columns // narrowest, max(count, 1))
        lines, columns = _even(count, lines), min(columns, vocabulary)
        kept = 0
        if trainable:
            spare = 5 * weight.numel() * itemsize // 2 if itemsize == 2 else 0
            if budget is not None:
                spare = max(0, budget - working_set(lines, columns))
            kept = spare // max(1, count * columns * itemsize)
        return cls(lines=lines, columns=columns, block=block, kept=min(kept, -(-vocabulary // columns)))


def _even(count: int, most: int) -> int:
    """Lines per tile: tiles of about one size, instead of full ones and a small rest that costs as many calls."""
    tiles = -(-count // most)
    return max(count, 1) if tiles <= 1 else min(most, -(-count // (32 * tiles)) * 32)


@dataclass(kw_only=True, eq=False)
class Running:
    """The state of the online softmax of some lines, updated in place; all [lines], fp32 or fp64."""

    reference: Tensor
    """The running maximum of the base-2 logits, rounded up."""
    others: Tensor
    """Sum of 2^(logit - reference) over the entries seen so far, the target left out."""
    raw_sum: Tensor | None
    """Sum of logits / factor, where means are asked for."""

    def of(self, lines: slice) -> "Running":
        """Views of some lines."""
        raw_sum = None if self.raw_sum is None else self.raw_sum[lines]
        return Running(reference=self.reference[lines], others=self.others[lines], raw_sum=raw_sum)


class TileSteps(Protocol):
    """The arithmetic on one tile: all that differs between plain PyTorch and a GPU kernel."""

    def scan(
        self,
        raw: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        running: Running,
        out: Tensor | None,
    ) -> Tensor:
        """Takes `raw` [lines, columns] (overwritten) into `running`; writes E * slope, zero at the target, to `out`.

        `targets` [lines] counts from the tile's first column and may lie outside.  `out` may be `raw`.  Returns
        [lines]: the power of two by which moving the reference shrinks what was accumulated before.
        """

    def gradient(
        self,
        raw: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        reference: Tensor,
        at_target: Tensor,
        coefficients: Tensor,
        out: Tensor,
    ) -> None:
        """From `raw` [columns, lines] (overwritten): E * slope, `at_target` at the targets, all times `coefficients`.

        The last three are [lines]; the result goes to `out`, which may be `raw`.
        """


class EagerSteps:
    """`TileSteps` in plain PyTorch: in-place passes over a tile that fits the cache."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def _wide(self, raw: Tensor) -> Tensor:
        """`raw` in fp32 (or fp64): itself, or a copy in memory that is used again for the next tile."""
        # Tiles of new memory would be handed back to the system and faulted in again one by one.
        if raw.dtype.itemsize > 2:
            return raw
        if self._memory is None or self._memory.numel() < raw.numel() or self._memory.device != raw.device:
            self._memory = torch.empty(raw.numel(), dtype=torch.float32, device=raw.device)
        return self._memory[: raw.numel()].view(raw.shape).copy_(raw)

    def scan(
        self,
        raw: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        running: Running,
        out: Tensor | None,
    ) -> Tensor:
        """See `TileSteps`."""
        wide, slope = _bent(self._wide(raw), None if bias is None else bias[None, :], transform)
        if running.raw_sum is not None:
            running.raw_sum += wide.sum(1)
        highest = (wide.amax(1) * transform.factor).ceil_()
        reference = torch.maximum(running.reference, highest)
        shrink = torch.exp2(running.reference - reference)
        tile = _powers(wide, reference[:, None], transform)
        put(tile, 1, targets, 0.0)
        running.others.mul_(shrink).add_(tile.sum(1))
        running.reference.copy_(reference)
        if slope is not None:
            tile *= slope
        if out is not None and out is not tile:
            out.copy_(tile)
        return shrink

    def gradient(
        self,
        raw: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        reference: Tensor,
        at_target: Tensor,
        coefficients: Tensor,
        out: Tensor,
    ) -> None:
        """See `TileSteps`."""
        wide, slope = _bent(self._wide(raw), None if bias is None else bias[:, None], transform)
        tile = _powers(wide, reference[None, :], transform).mul_(coefficients)
        if slope is not None:
            tile *= slope
        put(tile, 0, targets, at_target * coefficients)
        if out is not tile:
            out.copy_(tile)


def _bent(raw: Tensor, bias: Tensor | None, transform: Transform) -> tuple[Tensor, Tensor | None]:
    """raw + bias, in place; with a soft-cap tanh(inner * ...) of it, and tanh's slope there."""
    if bias is not None:
        raw += bias
    if transform.inner is None:
        return raw, None
    raw.mul_(transform.inner)
    slope = raw.cosh().reciprocal_().square_()  # 1 - tanh^2 has no digits left where tanh is close to 1
    return raw.tanh_(), slope


def _powers(raw: Tensor, reference: Tensor, transform: Transform) -> Tensor:
    """2^(factor * raw - reference), in place."""
    # One fused multiply-add.  Base 2, because torch.exp may take twenty times as long as torch.exp2 (MKL on AMD).
    return torch.add(-reference, raw, alpha=transform.factor, out=raw).exp2_()


def put(tile: Tensor, dim: int, targets: Tensor, values: Tensor | float) -> None:
    """tile[t, targets[t]] = values[t], or tile[targets[t], t] for dim 0; nothing for targets outside of the tile."""
    width = tile.shape[dim]
    inside = ((targets >= 0) & (targets < width)).unsqueeze(dim)
    index = targets.clamp(0, width - 1).unsqueeze(dim)
    if isinstance(values, Tensor):
        values = values.to(tile.dtype).unsqueeze(dim)
    # One index per line, so that scatter has no two writers; no mask indexing, which would wait for a GPU.
    tile.scatter_(dim, index, torch.where(inside, values, tile.gather(dim, index)))


def _cut(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most `step` that cover start..stop."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


@dataclass(kw_only=True, eq=False)
class _Kept:
    """E * slope of the first tiles of the vocabulary, zero at targets."""

    columns: list[slice]
    tiles: list[Tensor]
    """[N, columns] each, working dtype."""
    references: list[Tensor]
    """[N]: the reference at which each tile was made."""


@dataclass(kw_only=True, eq=False)
class _Scan:
    """What the scan leaves behind; [N] and fp32 or fp64 unless said otherwise."""

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
    hidden: Tensor | None
    """[N, H]: d logp / d hidden up to `Transform.derivative`, where asked for."""
    kept: _Kept


class _Head:
    """One call's inputs, and the passes over their tiles."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        transform: Transform,
        tiling: Tiling,
        steps: TileSteps,
    ) -> None:
        self.dtype = working_dtype(hidden.dtype, hidden.device)
        self.wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden, self.weight, self.tokens = hidden.to(self.dtype), weight, tokens
        self.bias = None if bias is None else bias.to(self.wide)
        self.transform, self.tiling, self.steps = transform, tiling, steps
        self._memory: dict[str, Tensor] = {}

    def scan(self, *, need_hidden: bool, need_means: bool) -> _Scan:
        """The pass over all tiles that every call needs."""
        target, target_slope = self._target_logits()
        running = Running(
            reference=target.ceil(),
            others=torch.zeros_like(target),
            raw_sum=torch.zeros_like(target) if need_means else None,
        )
        count = self.hidden.shape[0]
        tiles = list(_cut(self.weight.shape[0], self.tiling.columns))
        kept = self._room_for(tiles[: self.tiling.kept], target)
        expected = torch.empty_like(self.hidden, dtype=self.wide) if need_hidden else None
        for index, columns in enumerate(tiles):
            self._scan_tile(index, columns, running, kept, expected)
        if expected is not None:
            for lines in _cut(count, self.tiling.lines):
                self._finish_hidden(lines, target, target_slope, running, expected)
        return self._finish(target, target_slope, running, kept, expected)

    def _room_for(self, columns: list[slice], target: Tensor) -> "_Kept":
        count, total = len(self.hidden), columns[-1].stop if columns else 0
        memory = fresh_memory((count * total,), self.hidden)
        return _Kept(
            columns=columns,
            tiles=[memory[count * tile.start : count * tile.stop].view(count, -1) for tile in columns],
            references=[torch.empty_like(target) for _ in columns],
        )

    def _target_logits(self) -> tuple[Tensor, Tensor | None]:
        """[N]: each line's target logit in base 2, by a dot product in fp32, and tanh's slope there."""
        raw = torch.empty_like(self.tokens, dtype=self.wide)
        for lines in _cut(self.hidden.shape[0], self.tiling.lines):
            targets = self.weight[self.tokens[lines]].to(self.wide)
            raw[lines] = targets.mul_(self.hidden[lines]).sum(1)
        bent, slope = _bent(raw, None if self.bias is None else self.bias[self.tokens], self.transform)
        return bent * self.transform.factor, slope

    def _scan_tile(self, index: int, columns: slice, running: Running, kept: "_Kept", expected: Tensor | None) -> None:
        """One tile of the vocabulary for all lines; adds its E * slope times weight, unscaled, to `expected`."""
        weight = self.weight[columns].to(self.dtype)
        for_logits, for_hidden = in_blocks(weight), weight.T
        bias = None if self.bias is None else self.bias[columns]
        for lines in _cut(self.hidden.shape[0], self.tiling.lines):
            here = running.of(lines)
            raw = self._raw(self.hidden[lines], for_logits)
            out = None
            if index < len(kept.tiles):
                out = kept.tiles[index][lines]
            elif expected is not None:
                out = self._like(raw)
            shrink = self.steps.scan(raw, bias, self.tokens[lines] - columns.start, self.transform, here, out)
            if index < len(kept.tiles):
                kept.references[index][lines] = here.reference
            if expected is not None and out is not None:
                product = self._product(out, for_hidden)
                if index == 0:
                    expected[lines] = product
                else:
                    expected[lines].mul_(shrink[:, None]).add_(product)
                del product
            del raw, out  # before the next tile is made, not after

    def _finish_hidden(
        self, lines: slice, target: Tensor, target_slope: Tensor | None, running: Running, expected: Tensor
    ) -> None:
        """From sum(E * slope) @ weight to ((1 - p[token]) * slope[token] * weight[token] - that / sum)."""
        here, rows = running.of(lines), expected[lines]
        share = here.others if target_slope is None else here.others * target_slope[lines]
        targets = self.weight[self.tokens[lines]].to(self.wide).mul_(share[:, None])
        total = here.others + torch.exp2(target[lines] - here.reference)
        rows.neg_().add_(targets).div_(total[:, None])

    def _finish(
        self,
        target: Tensor,
        target_slope: Tensor | None,
        running: Running,
        kept: _Kept,
        hidden: Tensor | None,
    ) -> _Scan:
        at_target = torch.exp2(target - running.reference)
        total = running.others + at_target
        # Equal expressions: the first loses no digits where p > 1/2, the second where `at_target` has vanished.
        likely = -torch.log1p(running.others / at_target)
        unlikely = (target - running.reference) * math.log(2) - total.log()
        _, exponent = torch.frexp(total)
        shift = torch.exp2(-exponent.to(self.wide))
        means = running.raw_sum
        return _Scan(
            logps=torch.where(running.others < at_target, likely, unlikely),
            reference=running.reference + exponent,
            total=total * shift,
            others=running.others * shift,
            target_slope=target_slope,
            logit_means=None if means is None else means * (self.transform.factor * math.log(2) / len(self.weight)),
            hidden=hidden,
            kept=kept,
        )

    def hidden_gradient(self, scan: _Scan, w: Tensor) -> Tensor:
        """[N, H] in the dtype of the weight; uses up `scan.hidden`."""
        assert scan.hidden is not None
        gradient = scan.hidden.mul_((w * self.transform.derivative)[:, None]).to(self.weight.dtype)
        scan.hidden = None
        return gradient

    def weight_gradients(
        self, scan: _Scan, w: Tensor, *, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """d weight [V, H] and d bias [V], each block written once; uses up `scan.kept.tiles`."""
        if not need_weight and not need_bias:
            return None, None
        blank = torch.empty_like if len(self.hidden) else torch.zeros_like
        d_weight = blank(self.weight) if need_weight else None
        d_bias = blank(self.weight[:, 0]) if need_bias else None
        coefficients = (w * -self.transform.derivative).div_(scan.total)
        at_target = -scan.others if scan.target_slope is None else -scan.others * scan.target_slope
        if scan.kept.columns:
            rows = (self.hidden * coefficients[:, None]).to(self.dtype)
            for_weight = in_blocks(rows.T, 256)
            for columns, tile in self._kept_tiles(scan, at_target):
                if d_weight is not None:
                    times_transposed(tile, for_weight, d_weight[columns])
                if d_bias is not None:
                    d_bias[columns] = tile.to(self.wide) @ coefficients
            del rows, for_weight, tile
        done = scan.kept.columns[-1].stop if scan.kept.columns else 0
        scan.kept.tiles.clear()
        if done == len(self.weight):
            return d_weight, d_bias
        width = max(128, self.tiling.lines * self.tiling.columns // self.tiling.block)
        again = [
            (lines, in_blocks(self.hidden[lines]), in_blocks(self.hidden[lines].T, 256))
            for lines in _cut(len(self.hidden), self.tiling.block)
        ]
        for columns in _cut(len(self.weight), width, start=done):
            of_weight = of_bias = None
            for lines, for_logits, for_weight in again:
                tile = self._again(scan, columns, lines, for_logits, at_target, coefficients)
                if d_weight is not None:
                    of_weight = _plus(of_weight, times_transposed(tile, for_weight))
                if d_bias is not None:
                    of_bias = _plus(of_bias, tile.sum(1, dtype=self.wide))
            if d_weight is not None and of_weight is not None:
                d_weight[columns] = of_weight
            if d_bias is not None and of_bias is not None:
                d_bias[columns] = of_bias
        return d_weight, d_bias

    def _kept_tiles(self, scan: _Scan, at_target: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(columns, tile [columns, lines]) with all tiles at the final reference."""
        kept = scan.kept
        for columns, tile, reference in zip(kept.columns, kept.tiles, kept.references, strict=True):
            tile *= torch.exp2(reference - scan.reference)[:, None].to(self.dtype)
            put(tile, 1, self.tokens - columns.start, at_target)
            yield columns, tile.T

    def _again(
        self,
        scan: _Scan,
        columns: slice,
        lines: slice,
        hidden: Tensor | Blocks,
        at_target: Tensor,
        coefficients: Tensor,
    ) -> Tensor:
        """A tile [columns, lines], computed a second time; its lines scaled before anything is rounded to 16 bits."""
        # Transposed, because then both this product and the one with the rows read their operands as they lie.
        raw = self._raw(self.weight[columns].to(self.dtype), hidden)
        out = self._like(raw)
        bias = None if self.bias is None else self.bias[columns]
        targets, reference = self.tokens[lines] - columns.start, scan.reference[lines]
        self.steps.gradient(raw, bias, targets, self.transform, reference, at_target[lines], coefficients[lines], out)
        return out

    def _raw(self, a: Tensor, b: Tensor | Blocks) -> Tensor:
        """a @ b.T of one tile, in its own memory until the next call."""
        return times_transposed(a, b, self._reused("raw", len(a), len(b[0] if isinstance(b, tuple) else b)))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b.T in at least fp32, in its own memory until the next call."""
        product = times_transposed(a, b, self._reused("product", len(a), len(b)))
        if product.dtype.itemsize > 2:
            return product
        wide = self._reused("wide product", len(a), len(b), torch.float32)
        return product if wide is None else wide.copy_(product)

    def _reused(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Memory for results that a CPU leaves in bf16; None where products come wide, in memory of their own."""
        # New memory for each tile would be handed back to the system and faulted in again, page by page.
        if self.dtype != torch.bfloat16 or self.hidden.is_cuda:
            return None
        memory = self._memory.get(name)
        if memory is None or memory.numel() < rows * columns:
            memory = self._memory[name] = self.hidden.new_empty(rows * columns, dtype=dtype or self.dtype)
        return memory[: rows * columns].view(rows, columns)

    def _like(self, raw: Tensor) -> Tensor:
        """Where a tile goes to be multiplied: `raw` itself unless it is too wide."""
        return raw if raw.dtype == self.dtype else torch.empty_like(raw, dtype=self.dtype)


def _plus(total: Tensor | None, product: Tensor) -> Tensor:
    """Sums of partial products, in fp32 from the second on."""
    return product if total is None else at_least_fp32(total).add_(product)
