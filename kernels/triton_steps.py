"""The arithmetic on one tile as two Triton kernels: each reads a tile of products once and writes it once.

Imported on first use, since it needs triton.  `scan` says what is computed; names are those of `TorchSteps`.
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

    takes_centers = fp32_products = False  # cuBLAS returns products of 16 bits in fp32
    # Triton reads 16 bytes at once where it knows that rows begin and end at multiples of 16 entries.  cuBLAS needs
    # multiples of 8 in 16 bits for its fastest products.
    alignment = 16

    def scan(self, tile: Tile, running: OnlineSoftmax, out: Tensor | None) -> Tensor:
        """See `TileSteps`; one program per target.  Padding at the ends of rows is read and written too."""
        products, bias, transform = tile.products, tile.bias, tile.transform
        targets, columns = products.shape
        rescale = torch.empty_like(running.running_max)
        # Pointers that are not used must still be pointers.
        _scan[(targets,)](
            products,
            products.stride(0),
            products if bias is None else bias,
            tile.target_columns,
            running.running_max,
            running.exp_sum,
            running.exp_sum if running.logit_sum is None else running.logit_sum,
            rescale,
            products if out is None else out,
            0 if out is None else out.stride(0),
            columns,
            products.stride(0) if out is None else min(products.stride(0), out.stride(0)),
            transform.factor,
            transform.inner or 1.0,
            HAS_BIAS=bias is not None,
            HAS_CAP=transform.inner is not None,
            HAS_SUM=running.logit_sum is not None,
            HAS_OUT=out is not None,
            BLOCK=triton.next_power_of_2(columns),
            num_warps=8,
        )
        return rescale

    def gradient(
        self, tile: Tile, running_max: Tensor, target_entry: Tensor, coefficients: Tensor, out: Tensor
    ) -> None:
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
            target_entry,
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
def _softcap(x):
    # (tanh(x), 1 - tanh(x)^2).  exp of a negative number cannot overflow.  The slope is not computed from tanh, because
    # 1 - tanh^2 has no digits left where tanh is close to 1.
    decayed = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decayed) / (1.0 + decayed)
    return tl.where(x < 0, -size, size), 4.0 * decayed / ((1.0 + decayed) * (1.0 + decayed))


@triton.jit
def _scan(
    products,
    products_stride,
    bias,
    target_columns,
    running_max,
    exp_sum,
    logit_sum,
    rescale,
    out,
    out_stride,
    columns,
    padded_columns,
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
    inside, in_memory = column < columns, column < padded_columns
    unscaled = tl.load(products + target * products_stride + column, mask=in_memory, other=0.0).to(tl.float32)
    if HAS_BIAS:
        unscaled += tl.load(bias + column, mask=inside, other=0.0)
    if HAS_CAP:
        unscaled, slope = _softcap(unscaled * inner)
    if HAS_SUM:
        total = tl.sum(tl.where(inside, unscaled, 0.0), axis=0)
        tl.store(logit_sum + target, tl.load(logit_sum + target) + total)
    # The running maximum is an integer: `scale` is a power of two, which rounds nothing.
    old_max = tl.load(running_max + target)
    highest = tl.max(tl.where(inside, unscaled * factor, -float("inf")), axis=0)
    new_max = tl.maximum(old_max, tl.ceil(highest))
    scale = tl.exp2(old_max - new_max)
    exp_logits = tl.exp2(unscaled * factor - new_max)
    exp_logits = tl.where(inside & (column != tl.load(target_columns + target)), exp_logits, 0.0)
    tl.store(exp_sum + target, tl.load(exp_sum + target) * scale + tl.sum(exp_logits, axis=0))
    tl.store(running_max + target, new_max)
    tl.store(rescale + target, scale)
    if HAS_OUT:
        if HAS_CAP:
            exp_logits *= slope
        tl.store(out + target * out_stride + column, exp_logits.to(out.dtype.element_ty), mask=in_memory)


@triton.jit
def _gradient(
    products,
    products_stride,
    bias,
    target_columns,
    running_max,
    target_entry,
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
    unscaled = tl.load(products + column * products_stride + target, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        unscaled += tl.load(bias + column)
    if HAS_CAP:
        unscaled, slope = _softcap(unscaled * inner)
    entries = tl.exp2(unscaled * factor - tl.load(running_max + target, mask=inside, other=0.0))
    if HAS_CAP:
        entries *= slope
    is_target = tl.load(target_columns + target, mask=inside, other=-1) == column
    entries = tl.where(is_target, tl.load(target_entry + target, mask=inside, other=0.0), entries)
    entries *= tl.load(coefficients + target, mask=inside, other=0.0)
    tl.store(out + column * out_stride + target, entries.to(out.dtype.element_ty), mask=inside)
