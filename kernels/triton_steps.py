"""The arithmetic on one tile as two Triton kernels: each reads a tile of logits once and writes it once.

Imported on first use, since it needs triton.  See `chunked` for what is computed; names are those of `EagerSteps`.
"""

# ruff: noqa: N803  # compile-time constants are in capitals in Triton's own kernels
import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_plugins.kernels.tile_steps import OnlineSoftmax, Tile

_TARGETS_PER_PROGRAM = 1024


class TritonSteps:
    """`TileSteps` for fp32, bf16 and fp16 on CUDA devices (and under TRITON_INTERPRET=1 on any)."""

    takes_centers = widens = False  # cuBLAS returns products of 16 bits in fp32

    def scan(self, tile: Tile, running: OnlineSoftmax, out: Tensor | None) -> Tensor:
        """See `TileSteps`; one program per target."""
        products, bias, transform = tile.products, tile.bias, tile.transform
        targets, columns = products.shape
        shrink = torch.empty_like(running.running_max)
        # Pointers that are not used must still be pointers.
        _scan[(targets,)](
            products,
            products.stride(0),
            products if bias is None else bias,
            tile.target_columns,
            running.running_max,
            running.exp_sum,
            running.exp_sum if running.logit_sum is None else running.logit_sum,
            shrink,
            products if out is None else out,
            0 if out is None else out.stride(0),
            columns,
            transform.factor,
            transform.inner or 1.0,
            HAS_BIAS=bias is not None,
            HAS_CAP=transform.inner is not None,
            HAS_SUM=running.logit_sum is not None,
            HAS_OUT=out is not None,
            BLOCK=triton.next_power_of_2(columns),
            num_warps=8,
        )
        return shrink

    def gradient(self, tile: Tile, running_max: Tensor, at_target: Tensor, coefficients: Tensor, out: Tensor) -> None:
        """See `TileSteps`; one program per vocabulary entry and block of targets."""
        products, bias, transform = tile.products, tile.bias, tile.transform
        columns, targets = products.shape
        block = min(_TARGETS_PER_PROGRAM, triton.next_power_of_2(targets))
        _gradient[(columns, triton.cdiv(targets, block))](
            products,
            products.stride(0),
            products if bias is None else bias,
            tile.target_columns,
            running_max,
            at_target,
            coefficients,
            out,
            out.stride(0),
            targets,
            transform.factor,
            transform.inner or 1.0,
            HAS_BIAS=bias is not None,
            HAS_CAP=transform.inner is not None,
            BLOCK=block,
            num_warps=4,
        )


@triton.jit
def _softcap(x):  # type: ignore[no-untyped-def]
    # tanh and its slope.  exp of a negative number only, so that it cannot overflow; 1 - tanh^2 would have no digits
    # left where tanh is close to 1.
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -size, size), 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk))


@triton.jit  # type: ignore[untyped-decorator]
def _scan(  # type: ignore[no-untyped-def]
    products,
    raw_stride,
    bias,
    target_columns,
    running_max,
    exp_sum,
    logit_sum,
    shrink,
    out,
    out_stride,
    columns,
    factor,
    inner,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64)  # a product of target and stride may exceed 32 bits
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(products + target * raw_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0)
    if HAS_CAP:
        x, slope = _softcap(x * inner)
    if HAS_SUM:
        tl.store(logit_sum + target, tl.load(logit_sum + target) + tl.sum(tl.where(inside, x, 0.0), axis=0))
    before = tl.load(running_max + target)
    highest = tl.max(tl.where(inside, x * factor, -float("inf")), axis=0)
    top = tl.maximum(before, tl.ceil(highest))
    scale = tl.exp2(before - top)
    power = tl.exp2(x * factor - top)
    power = tl.where(inside & (column != tl.load(target_columns + target)), power, 0.0)
    tl.store(exp_sum + target, tl.load(exp_sum + target) * scale + tl.sum(power, axis=0))
    tl.store(running_max + target, top)
    tl.store(shrink + target, scale)
    if HAS_OUT:
        if HAS_CAP:
            power *= slope
        tl.store(out + target * out_stride + column, power.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    products,
    raw_stride,
    bias,
    target_columns,
    running_max,
    at_target,
    coefficients,
    out,
    out_stride,
    targets,
    factor,
    inner,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64)
    target = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = target < targets
    x = tl.load(products + column * raw_stride + target, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column)
    if HAS_CAP:
        x, slope = _softcap(x * inner)
    power = tl.exp2(x * factor - tl.load(running_max + target, mask=inside, other=0.0))
    if HAS_CAP:
        power *= slope
    is_target = tl.load(target_columns + target, mask=inside, other=-1) == column
    power = tl.where(is_target, tl.load(at_target + target, mask=inside, other=0.0), power)
    power *= tl.load(coefficients + target, mask=inside, other=0.0)
    tl.store(out + column * out_stride + target, power.to(out.dtype.element_ty), mask=inside)
