"""The arithmetic on one tile: from products of hidden states and weight to softmax terms and back.

Logits are in base 2: l = log2(e) * logit, so that 2^l = e^logit.  Two reasons: exp2 is faster than exp, and with a
running maximum that is an integer every rescaling of sums multiplies by a power of two, which rounds nothing.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orpo_plugins.hooks.types import HeadOptions

_INVERTIBLE = 0.99
"""Largest |tanh| that `Transform.inverse` inverts: it is needed approximately alone, and atanh(1) is infinite."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How x = hidden @ weight.T + bias becomes base-2 logits: factor * x; factor * tanh(inner * x) with a soft-cap."""

    factor: float
    inner: float | None

    @classmethod
    def from_options(cls, options: HeadOptions) -> "Transform":
        """From scale and soft-cap."""
        log2_e = 1 / math.log(2)
        if options.softcap is None:
            return cls(factor=options.logit_scale * log2_e, inner=None)
        return cls(factor=options.softcap * log2_e, inner=options.logit_scale / options.softcap)

    @property
    def derivative(self) -> float:
        """d logit / d x, in base e, at x = 0: J is this times the slope of tanh."""
        return self.factor * (self.inner or 1.0) * math.log(2)

    def inverse(self, logits: Tensor) -> Tensor:
        """x of base-2 logits, approximately."""
        unscaled = logits / self.factor
        if self.inner is None:
            return unscaled
        return unscaled.clamp_(-_INVERTIBLE, _INVERTIBLE).atanh_() / self.inner


@dataclass(kw_only=True, eq=False)
class OnlineSoftmax:
    """The state of the online softmax (Milakov and Gimelshein 2018) of some targets; [targets], fp32 or fp64.

    `TileSteps.scan` updates it in place.
    """

    running_max: Tensor
    """The largest base-2 logit so far, rounded up to an integer."""
    exp_sum: Tensor
    """Sum of 2^(logit - running_max) over the entries seen so far, without the target's own token."""
    logit_sum: Tensor | None
    """Sum of logits / factor, where means are asked for."""

    def part(self, targets: slice) -> "OnlineSoftmax":
        """Views of some targets."""
        logit_sum = None if self.logit_sum is None else self.logit_sum[targets]
        return OnlineSoftmax(running_max=self.running_max[targets], exp_sum=self.exp_sum[targets], logit_sum=logit_sum)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """Products of some targets' hidden states and vocabulary entries, and what makes logits of them."""

    products: Tensor
    """hidden @ weight.T - center; it is overwritten."""
    center: Tensor | None
    """[targets]: what was subtracted from the products of each target; see `Operands.center`."""
    bias: Tensor | None
    """[columns]."""
    target_columns: Tensor
    """[targets]: each target's token, counted from the tile's first column; it may lie outside."""
    transform: Transform


class TileSteps(Protocol):
    """The arithmetic on one tile: all that differs between plain PyTorch and a GPU kernel."""

    takes_centers: bool
    """Whether tiles may have a `center`."""
    fp32_products: bool
    """Whether 16-bit operands are to be multiplied in fp32."""
    alignment: int
    """Rows of a tile lie a multiple of this apart, and the number of targets is a multiple of it; 1 for any."""

    def scan(self, tile: Tile, running: OnlineSoftmax, out: Tensor | None) -> Tensor:
        """Takes a tile [targets, columns] into `running`; writes exp_logits * slope, zero at the target, to `out`.

        `out` may be `tile.products`.  Returns `rescale` [targets], the power of two that brings earlier sums from the
        old running maximum to the new one.
        """

    def gradient(
        self, tile: Tile, running_max: Tensor, target_entry: Tensor, coefficients: Tensor, out: Tensor
    ) -> None:
        """Writes coefficients * (exp_logits * slope, or `target_entry` at the targets' tokens) of a tile to `out`.

        The tile lies transposed, [columns, targets]; the other three are [targets].  `out` may be `tile.products`.
        """


class TorchSteps:
    """`TileSteps` in plain PyTorch: in-place passes over a tile that fits the cache."""

    takes_centers = True
    alignment = 1

    def __init__(self, *, fp32_products: bool = False) -> None:
        self.fp32_products = fp32_products
        self._memory: Tensor | None = None

    def _wide(self, products: Tensor) -> Tensor:
        """`products` in fp32 (or fp64): itself, or a copy in memory that is used again for the next tile."""
        # A new buffer per tile would be handed back to the system and faulted in again, page by page.
        if products.dtype.itemsize > 2:
            return products
        if self._memory is None or self._memory.numel() < products.numel() or self._memory.device != products.device:
            self._memory = torch.empty(products.numel(), dtype=torch.float32, device=products.device)
        return self._memory[: products.numel()].view(products.shape).copy_(products)

    def scan(self, tile: Tile, running: OnlineSoftmax, out: Tensor | None) -> Tensor:
        """See `TileSteps`.

        1. logits, up to factor and offset
        2. the new running maximum, and what it rescales earlier sums by
        3. exponentials, without the target's own
        4. their sum, and the slope of the soft-cap for the gradient
        """
        transform = tile.transform
        unscaled, slope, offset = _unscaled_logits(
            self._wide(tile.products), _unsqueezed(tile.center, 1), _unsqueezed(tile.bias, 0), transform
        )
        if running.logit_sum is not None:
            running.logit_sum += unscaled.sum(1)
            if offset is not None:
                running.logit_sum += offset[:, 0] * unscaled.shape[1]
        highest = unscaled.amax(1) if offset is None else unscaled.amax(1).add_(offset[:, 0])
        running_max = torch.maximum(running.running_max, highest.mul_(transform.factor).ceil_())
        rescale = torch.exp2(running.running_max - running_max)
        exp_logits = _exp_logits(unscaled, offset, running_max[:, None], transform)
        scatter_targets(exp_logits, 1, tile.target_columns, 0.0)
        running.exp_sum.mul_(rescale).add_(exp_logits.sum(1))
        running.running_max.copy_(running_max)
        if slope is not None:
            exp_logits *= slope
        if out is not None and out is not exp_logits:
            out.copy_(exp_logits)
        return rescale

    def gradient(
        self, tile: Tile, running_max: Tensor, target_entry: Tensor, coefficients: Tensor, out: Tensor
    ) -> None:
        """See `TileSteps`."""
        transform = tile.transform
        unscaled, slope, offset = _unscaled_logits(
            self._wide(tile.products), _unsqueezed(tile.center, 0), _unsqueezed(tile.bias, 1), transform
        )
        entries = _exp_logits(unscaled, offset, running_max[None, :], transform).mul_(coefficients)
        if slope is not None:
            entries *= slope
        scatter_targets(entries, 0, tile.target_columns, target_entry * coefficients)
        if out is not entries:
            out.copy_(entries)


def _unsqueezed(values: Tensor | None, dim: int) -> Tensor | None:
    return None if values is None else values.unsqueeze(dim)


def _unscaled_logits(
    products: Tensor, center: Tensor | None, bias: Tensor | None, transform: Transform
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(unscaled, slope of tanh, offset), in place, with logits = factor * (unscaled + offset).

    x = products + center + bias; unscaled + offset = x, or tanh(inner * x) with a soft-cap.
    """
    if bias is not None:
        products += bias
    if transform.inner is None:
        return products, None, center  # added later, to [targets] numbers and not to a tile
    if center is not None:
        products += center
    products.mul_(transform.inner)
    slope = products.cosh().reciprocal_().square_()  # 1 - tanh^2 has no digits left where tanh is close to 1
    return products.tanh_(), slope, None


def _exp_logits(unscaled: Tensor, offset: Tensor | None, running_max: Tensor, transform: Transform) -> Tensor:
    """2^(factor * (unscaled + offset) - running_max), in place."""
    shift = -running_max if offset is None else offset * transform.factor - running_max
    # One fused multiply-add.  torch.exp may take twenty times as long as torch.exp2 (MKL on AMD).
    return torch.add(shift, unscaled, alpha=transform.factor, out=unscaled).exp2_()


def target_logits(products: Tensor, bias: Tensor | None, transform: Transform) -> tuple[Tensor, Tensor | None]:
    """(base-2 logits, tanh's slope with a soft-cap) of the targets' own products [N], in place."""
    unscaled, slope, _ = _unscaled_logits(products, None, bias, transform)
    return unscaled.mul_(transform.factor), slope


def scatter_targets(tile: Tensor, dim: int, target_columns: Tensor, values: Tensor | float) -> None:
    """Writes values[t] at each target's token; nothing where the token lies outside of the tile.

    tile[t, target_columns[t]] = values[t] for dim 1, tile[target_columns[t], t] = values[t] for dim 0.
    """
    width = tile.shape[dim]
    inside = ((target_columns >= 0) & (target_columns < width)).unsqueeze(dim)
    index = target_columns.clamp(0, width - 1).unsqueeze(dim)
    if isinstance(values, Tensor):
        values = values.to(tile.dtype).unsqueeze(dim)
    # One index per target, so that scatter has no two writers; no mask indexing, which would wait for a GPU.
    tile.scatter_(dim, index, torch.where(inside, values, tile.gather(dim, index)))
