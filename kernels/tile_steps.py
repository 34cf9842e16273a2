"""From products of hidden states and weight to softmax terms and back: the arithmetic on one tile of logits."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orpo_plugins.hooks.types import HeadOptions


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How products h @ w become logits in base 2: `factor * x`, or `factor * tanh(inner * x)` with a soft-cap."""

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
        """d logit / d product, in base e, at the origin: what remains of J when tanh's own slope is taken out."""
        return self.factor * (self.inner or 1.0) * math.log(2)

    def products_near(self, running_max: Tensor) -> Tensor:
        """Products whose logits are about `running_max`."""
        softcapped = running_max / self.factor
        return softcapped if self.inner is None else softcapped.clamp_(-0.99, 0.99).atanh_() / self.inner


@dataclass(kw_only=True, eq=False)
class OnlineSoftmax:
    """The state of the online softmax of some targets, updated in place; all [targets], fp32 or fp64."""

    running_max: Tensor
    """The running maximum of the base-2 logits, rounded up."""
    exp_sum: Tensor
    """Sum of 2^(logit - running_max) over the entries seen so far, the target's own token left out."""
    logit_sum: Tensor | None
    """Sum of logits / factor, where means are asked for."""

    def of(self, targets: slice) -> "OnlineSoftmax":
        """Views of some targets."""
        logit_sum = None if self.logit_sum is None else self.logit_sum[targets]
        return OnlineSoftmax(running_max=self.running_max[targets], exp_sum=self.exp_sum[targets], logit_sum=logit_sum)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """Products of some targets' hidden states and vocabulary entries, and what makes logits of them."""

    products: Tensor
    """hidden @ weight.T less `center`; it is overwritten."""
    center: Tensor | None
    """[targets]: what was subtracted from the products of each target."""
    bias: Tensor | None
    """[columns]."""
    target_columns: Tensor
    """[targets]: each target's token, counted from the tile's first column; it may lie outside."""
    transform: Transform


class TileSteps(Protocol):
    """The arithmetic on one tile: all that differs between plain PyTorch and a GPU kernel."""

    takes_centers: bool
    """Whether tiles may have a `center`."""
    widens: bool
    """Whether 16-bit operands are to be multiplied in fp32."""

    def scan(self, tile: Tile, running: OnlineSoftmax, out: Tensor | None) -> Tensor:
        """Takes a tile [targets, columns] into `running`; writes exp_logits * slope, zero at the target, to `out`.

        `out` may be `tile.products`.  Returns [targets]: the power of two by which a new maximum shrinks what was
        accumulated before.
        """

    def gradient(self, tile: Tile, running_max: Tensor, at_target: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """From a tile [columns, targets]: exp_logits * slope, `at_target` at the targets' tokens, times `coefficients`.

        The three are [targets]; the result goes to `out`, which may be `tile.products`.
        """


class EagerSteps:
    """`TileSteps` in plain PyTorch: in-place passes over a tile that fits the cache."""

    takes_centers = True

    def __init__(self, *, widens: bool = False) -> None:
        self.widens = widens
        self._memory: Tensor | None = None

    def _wide(self, products: Tensor) -> Tensor:
        """`products` in fp32 (or fp64): itself, or a copy in memory that is used again for the next tile."""
        # Tiles of new memory would be handed back to the system and faulted in again one by one.
        if products.dtype.itemsize > 2:
            return products
        if self._memory is None or self._memory.numel() < products.numel() or self._memory.device != products.device:
            self._memory = torch.empty(products.numel(), dtype=torch.float32, device=products.device)
        return self._memory[: products.numel()].view(products.shape).copy_(products)

    def scan(self, tile: Tile, running: OnlineSoftmax, out: Tensor | None) -> Tensor:
        """See `TileSteps`."""
        transform = tile.transform
        wide, slope, origin = _softcap(
            self._wide(tile.products), _across(tile.center, 1), _across(tile.bias, 0), transform
        )
        if running.logit_sum is not None:
            running.logit_sum += wide.sum(1)
            if origin is not None:
                running.logit_sum += origin[:, 0] * wide.shape[1]
        highest = wide.amax(1) if origin is None else wide.amax(1).add_(origin[:, 0])
        running_max = torch.maximum(running.running_max, highest.mul_(transform.factor).ceil_())
        shrink = torch.exp2(running.running_max - running_max)
        powers = _powers(wide, origin, running_max[:, None], transform)
        scatter_targets(powers, 1, tile.target_columns, 0.0)
        running.exp_sum.mul_(shrink).add_(powers.sum(1))
        running.running_max.copy_(running_max)
        if slope is not None:
            powers *= slope
        if out is not None and out is not powers:
            out.copy_(powers)
        return shrink

    def gradient(self, tile: Tile, running_max: Tensor, at_target: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """See `TileSteps`."""
        transform = tile.transform
        wide, slope, origin = _softcap(
            self._wide(tile.products), _across(tile.center, 0), _across(tile.bias, 1), transform
        )
        powers = _powers(wide, origin, running_max[None, :], transform).mul_(coefficients)
        if slope is not None:
            powers *= slope
        scatter_targets(powers, 0, tile.target_columns, at_target * coefficients)
        if out is not powers:
            out.copy_(powers)


def _across(values: Tensor | None, dim: int) -> Tensor | None:
    """A row (0) or a column (1)."""
    return None if values is None else values.unsqueeze(dim)


def _softcap(
    products: Tensor, offset: Tensor | None, bias: Tensor | None, transform: Transform
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(softcapped, tanh's slope there, what is still to be added to softcapped), in place.

    softcapped is offset + products + bias; with a soft-cap tanh(inner * ...) of it.
    """
    if bias is not None:
        products += bias
    if transform.inner is None:
        return products, None, offset  # adding the offset can wait for an operation on [targets] numbers
    if offset is not None:
        products += offset
    products.mul_(transform.inner)
    slope = products.cosh().reciprocal_().square_()  # 1 - tanh^2 has no digits left where tanh is close to 1
    return products.tanh_(), slope, None


def _powers(softcapped: Tensor, origin: Tensor | None, running_max: Tensor, transform: Transform) -> Tensor:
    """2^(factor * (origin + softcapped) - running_max), in place."""
    shift = -running_max if origin is None else origin * transform.factor - running_max
    # One fused multiply-add.  Base 2, because torch.exp may take twenty times as long as torch.exp2 (MKL on AMD).
    return torch.add(shift, softcapped, alpha=transform.factor, out=softcapped).exp2_()


def softcapped_targets(products: Tensor, bias: Tensor | None, transform: Transform) -> tuple[Tensor, Tensor | None]:
    """(base-2 logits, tanh's slope with a soft-cap) of the targets' own products [N], in place."""
    softcapped, slope, _ = _softcap(products, None, bias, transform)
    return softcapped.mul_(transform.factor), slope


def scatter_targets(tile: Tensor, dim: int, target_columns: Tensor, values: Tensor | float) -> None:
    """tile[t, targets[t]] = values[t], or tile[targets[t], t] for dim 0; nothing for targets outside of the tile."""
    width = tile.shape[dim]
    inside = ((target_columns >= 0) & (target_columns < width)).unsqueeze(dim)
    index = target_columns.clamp(0, width - 1).unsqueeze(dim)
    if isinstance(values, Tensor):
        values = values.to(tile.dtype).unsqueeze(dim)
    # One index per target, so that scatter has no two writers; no mask indexing, which would wait for a GPU.
    tile.scatter_(dim, index, torch.where(inside, values, tile.gather(dim, index)))
