"""Matrix products for tiles, by the fastest exact route that torch offers on each device."""

import math
import mmap

import torch
from torch import Tensor

# torch.mm sends fp32 on x86 to MKL, which on CPUs that are not Intel's leaves half of the vector width unused: 225
# against 465 GFLOP/s per two Zen 5 cores.  oneDNN, which ships with torch as well, does not.  This is the operator
# that torch.compile itself emits for linear layers; there is no public name for it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# fp32 results of 16-bit products came with torch 2.8.
_WIDE_RESULTS = hasattr(torch.ops.aten.mm, "dtype")


def times_transposed(a: Tensor, b: Tensor, out: Tensor | None = None, *, block: int = 1024) -> Tensor:
    """a [M, K] @ b[N, K].T, in fp32 (fp64 for fp64) where the device can give it, else in the dtype of `a`.

    Returns `out` where it is given, rounded to its dtype.  fp32 products on a CPU are summed in blocks of K: each
    costs 2 to 3 % of the time at 128, and keeps rounding from growing with the root of K.
    """
    if _WIDE_RESULTS and a.is_cuda and a.dtype.itemsize == 2 and (out is None or out.dtype == torch.float32):
        product = torch.mm(a, b.T, out_dtype=torch.float32)
    elif a.device.type == "cpu" and a.dtype == torch.float32 and _ONEDNN is not None and a.numel() and b.numel():
        product = _in_blocks(a, b, block)
    else:
        return torch.mm(a, b.T) if out is None else torch.mm(a, b.T, out=out)
    return product if out is None else out.copy_(product)


def _in_blocks(a: Tensor, b: Tensor, block: int) -> Tensor:
    """a @ b.T in fp32 by oneDNN, which adds the terms of a dot product one after another, as a sum over blocks."""
    blocks = -(-a.shape[1] // block)
    total: Tensor | None = None
    for left, right in zip(a.chunk(blocks, 1), b.chunk(blocks, 1), strict=True):
        # Rows with gaps between them on the right send oneDNN to an implementation a thousand times slower.
        right = right if right.is_contiguous() or right.T.is_contiguous() else right.contiguous()
        part: Tensor = _ONEDNN(left, right, None, "none", [], "")  # type: ignore[misc]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which tiles are multiplied: fp32 for fp16 on a CPU, which has no fast fp16 product."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def fresh_memory(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialized memory for a large buffer that is written once and read once."""
    size = math.prod(shape) * like.dtype.itemsize
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < 2**22:
        return like.new_empty(shape)
    # Pages of 4 KiB, faulted in one by one, cost as much time as a fifth of what keeping the buffer saves.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)
