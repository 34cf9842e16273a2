"""From raw products to softmax terms and back: the arithmetic on one tile of the fused head."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orpo_plugins.interfaces import HeadOptions


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

    def raw_near(self, reference: Tensor) -> Tensor:
        """Raw products whose logits are about `reference`."""
        bent = reference / self.factor
        return bent if self.inner is None else bent.clamp_(-0.99, 0.99).atanh_() / self.inner


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """Raw products of some lines and vocabulary entries, and what makes logits of them."""

    raw: Tensor
    """hidden @ weight.T less `center`; it is overwritten."""
    center: Tensor | None
    """[lines]: what was taken off the raw products of each line."""
    bias: Tensor | None
    """[columns]."""
    targets: Tensor
    """[lines]: counted from the tile's first column; they may lie outside."""
    transform: Transform


class TileSteps(Protocol):
    """The arithmetic on one tile: all that differs between plain PyTorch and a GPU kernel."""

    takes_centers: bool
    """Whether tiles may have a `center`."""
    widens: bool
    """Whether 16-bit operands are to be multiplied in fp32."""

    def scan(self, tile: Tile, running: Running, out: Tensor | None) -> Tensor:
        """Takes a tile [lines, columns] into `running`; writes E * slope, zero at the target, to `out`.

        `out` may be `tile.raw`.  Returns [lines]: the power of two by which moving the reference shrinks what was
        accumulated before.
        """

    def gradient(self, tile: Tile, reference: Tensor, at_target: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """From a tile [columns, lines]: E * slope, `at_target` at the targets, all times `coefficients`.

        The three are [lines]; the result goes to `out`, which may be `tile.raw`.
        """


class EagerSteps:
    """`TileSteps` in plain PyTorch: in-place passes over a tile that fits the cache."""

    takes_centers = True

    def __init__(self, *, widens: bool = False) -> None:
        self.widens = widens
        self._memory: Tensor | None = None

    def _wide(self, raw: Tensor) -> Tensor:
        """`raw` in fp32 (or fp64): itself, or a copy in memory that is used again for the next tile."""
        # Tiles of new memory would be handed back to the system and faulted in again one by one.
        if raw.dtype.itemsize > 2:
            return raw
        if self._memory is None or self._memory.numel() < raw.numel() or self._memory.device != raw.device:
            self._memory = torch.empty(raw.numel(), dtype=torch.float32, device=raw.device)
        return self._memory[: raw.numel()].view(raw.shape).copy_(raw)

    def scan(self, tile: Tile, running: Running, out: Tensor | None) -> Tensor:
        """See `TileSteps`."""
        transform = tile.transform
        wide, slope, origin = _bent(self._wide(tile.raw), _across(tile.center, 1), _across(tile.bias, 0), transform)
        if running.raw_sum is not None:
            running.raw_sum += wide.sum(1)
            if origin is not None:
                running.raw_sum += origin[:, 0] * wide.shape[1]
        highest = wide.amax(1) if origin is None else wide.amax(1).add_(origin[:, 0])
        reference = torch.maximum(running.reference, highest.mul_(transform.factor).ceil_())
        shrink = torch.exp2(running.reference - reference)
        powers = _powers(wide, origin, reference[:, None], transform)
        put(powers, 1, tile.targets, 0.0)
        running.others.mul_(shrink).add_(powers.sum(1))
        running.reference.copy_(reference)
        if slope is not None:
            powers *= slope
        if out is not None and out is not powers:
            out.copy_(powers)
        return shrink

    def gradient(self, tile: Tile, reference: Tensor, at_target: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """See `TileSteps`."""
        transform = tile.transform
        wide, slope, origin = _bent(self._wide(tile.raw), _across(tile.center, 0), _across(tile.bias, 1), transform)
        powers = _powers(wide, origin, reference[None, :], transform).mul_(coefficients)
        if slope is not None:
            powers *= slope
        put(powers, 0, tile.targets, at_target * coefficients)
        if out is not powers:
            out.copy_(powers)


def _across(values: Tensor | None, dim: int) -> Tensor | None:
    """A row (0) or a column (1)."""
    return None if values is None else values.unsqueeze(dim)


def _bent(
    raw: Tensor, offset: Tensor | None, bias: Tensor | None, transform: Transform
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(bent, tanh's slope there, what is still to be added to bent), in place.

    bent is offset + raw + bias; with a soft-cap tanh(inner * ...) of it.
    """
    if bias is not None:
        raw += bias
    if transform.inner is None:
        return raw, None, offset  # adding the offset can wait for an operation on [lines] numbers
    if offset is not None:
        raw += offset
    raw.mul_(transform.inner)
    slope = raw.cosh().reciprocal_().square_()  # 1 - tanh^2 has no digits left where tanh is close to 1
    return raw.tanh_(), slope, None


def _powers(bent: Tensor, origin: Tensor | None, reference: Tensor, transform: Transform) -> Tensor:
    """2^(factor * (origin + bent) - reference), in place."""
    shift = -reference if origin is None else origin * transform.factor - reference
    # One fused multiply-add.  Base 2, because torch.exp may take twenty times as long as torch.exp2 (MKL on AMD).
    return torch.add(shift, bent, alpha=transform.factor, out=bent).exp2_()


def bent_targets(raw: Tensor, bias: Tensor | None, transform: Transform) -> tuple[Tensor, Tensor | None]:
    """(base-2 logits, tanh's slope with a soft-cap) of raw products [N], in place."""
    bent, slope, _ = _bent(raw, None, bias, transform)
    return bent.mul_(transform.factor), slope


def put(tile: Tensor, dim: int, targets: Tensor, values: Tensor | float) -> None:
    """tile[t, targets[t]] = values[t], or tile[targets[t], t] for dim 0; nothing for targets outside of the tile."""
    width = tile.shape[dim]
    inside = ((targets >= 0) & (targets < width)).unsqueeze(dim)
    index = targets.clamp(0, width - 1).unsqueeze(dim)
    if isinstance(values, Tensor):
        values = values.to(tile.dtype).unsqueeze(dim)
    # One index per line, so that scatter has no two writers; no mask indexing, which would wait for a GPU.
    tile.scatter_(dim, index, torch.where(inside, values, tile.gather(dim, index)))
