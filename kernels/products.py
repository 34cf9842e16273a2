"""Matrix products of tiles, by the fastest exact way that torch offers on each device."""

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

# torch.mm sends fp32 on x86 to MKL, which on CPUs that are not Intel's leaves half of the vector width unused: 225
# against 465 GFLOP/s per two Zen 5 cores.  oneDNN, which ships with torch as well, does not.  This is the operator
# that torch.compile itself emits for linear layers; there is no public name for it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HUGE_PAGES_FROM = 2**22
"""Bytes from which a buffer is worth pages of 2 MiB."""

TERMS_PER_BLOCK = 128
"""Terms of an fp32 dot product that oneDNN adds one after another; see `in_blocks`."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix [N, K], cut along K."""

    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])


def times_transposed(a: Tensor, b: Tensor | Blocks, out: Tensor | None = None) -> Tensor:
    """a @ b.T, for a [M, K] and b [N, K], in fp32 (fp64 for fp64) where the device can give it, else in a's dtype.

    Returns `out` where it is given, rounded to its dtype.  With `b` from `in_blocks` the sum is taken block by block.
    """
    if isinstance(b, Blocks):
        product = _sum_of_blocks(a, b)
    elif a.is_cuda and a.dtype.itemsize == 2 and (out is None or out.dtype == torch.float32):
        return torch.mm(a, b.T, out_dtype=torch.float32, out=out)
    elif _takes_onednn(a) and a.numel() and b.numel():
        product = _onednn(a, _without_gaps(b))
    else:
        return torch.mm(a, b.T) if out is None else torch.mm(a, b.T, out=out)
    return product if out is None else out.copy_(product)


def product_minus_center(a: Tensor, b: Tensor, center: Tensor, out: Tensor | None) -> Tensor:
    """a @ b.T - center, for a [M, K] and b [N, K], rounded once to the dtype of `a`.

    `center` broadcasts to [M, N].  The dtype of `a` must hold it exactly.
    """
    return torch.addmm(center.to(a.dtype), a, b.T, beta=-1, out=out)


def in_blocks(b: Tensor, *, uses: int = 2) -> Tensor | Blocks:
    """`b` [N, K], prepared so that `times_transposed` sums in blocks of K; `b` itself where that changes nothing.

    `uses` is the number of products that will read it.

    oneDNN adds the terms of a dot product one after another, so that the rounding error in fp32 grows with the root
    of K.  In blocks the error stays below that of MKL, which takes twice the time.
    """
    blocks = -(-b.shape[1] // TERMS_PER_BLOCK)
    if blocks < 2 or not b.numel() or not _takes_onednn(b):
        return b
    parts = b.chunk(blocks, 1)
    # For a single product each part is copied when its turn comes, so that they are not all in memory at once.
    return Blocks(parts if uses == 1 else tuple(map(_without_gaps, parts)))


def _takes_onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and _ONEDNN is not None


def _without_gaps(b: Tensor) -> Tensor:
    # With gaps between the rows of its right operand oneDNN takes an implementation that is a thousand times slower.
    return b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()


def _sum_of_blocks(a: Tensor, b: Blocks) -> Tensor:
    lefts = torch.split(a, [part.shape[1] for part in b.parts], dim=1)
    total = _onednn(lefts[0], _without_gaps(b.parts[0]))
    for left, right in zip(lefts[1:], b.parts[1:], strict=True):
        total += _onednn(left, _without_gaps(right))
    return total


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = _ONEDNN(a, b, None, "none", [], "")  # type: ignore[misc]  # `_takes_onednn` says that it is there
    return product


def working_dtype(dtype: torch.dtype, device: torch.device, *, fp32_products: bool) -> torch.dtype:
    """The dtype in which tiles are multiplied: fp32 also for fp16 on a CPU, which has no fast fp16 product."""
    slow = dtype == torch.float16 and device.type == "cpu"
    return torch.float32 if slow or (fp32_products and dtype.itemsize == 2) else dtype


def empty_in_huge_pages(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized memory on the device of `like`, for a large buffer that is written once and read once."""
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < _HUGE_PAGES_FROM:
        return like.new_empty(shape, dtype=dtype)
    # The system hands out pages of 4 KiB one by one; that would cost a fifth of the time that the buffer saves.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
