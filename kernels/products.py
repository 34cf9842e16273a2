"""Matrix products for tiles, by the fastest exact route that torch offers on each device."""

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

# torch.mm sends fp32 on x86 to MKL, which on CPUs that are not Intel's leaves half of the vector width unused: 225
# against 465 GFLOP/s per two Zen 5 cores.  oneDNN, which ships with torch as well, does not.  This is the operator
# that torch.compile itself emits for linear layers; there is no public name for it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# fp32 results of 16-bit products came with torch 2.8.
_WIDE_RESULTS = hasattr(torch.ops.aten.mm, "dtype")


SUMMED = 128
"""Terms of an fp32 dot product that oneDNN adds one after another; see `in_blocks`."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix [N, K], cut along K."""

    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])


def times_transposed(a: Tensor, b: Tensor | Blocks, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b[N, K].T, in fp32 (fp64 for fp64) where the device can give it, else in the dtype of `a`.

    Returns `out` where it is given, rounded to its dtype.  With `b` from `in_blocks` the sum is taken block by block.
    """
    if isinstance(b, Blocks):
        product = _summed(a, b)
    elif _WIDE_RESULTS and a.is_cuda and a.dtype.itemsize == 2 and (out is None or out.dtype == torch.float32):
        product = torch.mm(a, b.T, out_dtype=torch.float32)
    elif _by_onednn(a) and a.numel() and b.numel():
        product = _onednn(a, _gapless(b))
    else:
        return torch.mm(a, b.T) if out is None else torch.mm(a, b.T, out=out)
    return product if out is None else out.copy_(product)


def product_less(a: Tensor, b: Tensor, less: Tensor, out: Tensor | None) -> Tensor:
    """a [M, K] @ b[N, K].T - less, for a `less` that broadcasts to [M, N], rounded once to the dtype of `a`.

    That dtype must hold `less` exactly.
    """
    return torch.addmm(less.to(a.dtype), a, b.T, beta=-1, out=out)


def in_blocks(b: Tensor, *, uses: int = 2) -> Tensor | Blocks:
    """`b` [N, K] for some products that are to be summed in blocks of K; itself where that would change nothing.

    oneDNN adds the terms of a dot product one after another, so that rounding in fp32 grows with the root of K.  In
    blocks it stays below that of MKL, which takes twice the time.
    """
    blocks = -(-b.shape[1] // SUMMED)
    if blocks < 2 or not b.numel() or not _by_onednn(b):
        return b
    parts = b.chunk(blocks, 1)
    # For a single product each part is copied when its turn comes, so that they are not all in memory at once.
    return Blocks(parts if uses == 1 else tuple(map(_gapless, parts)))


def _by_onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and _ONEDNN is not None


def _gapless(b: Tensor) -> Tensor:
    # Rows with gaps between them on the right send oneDNN to an implementation a thousand times slower.
    return b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()


def _summed(a: Tensor, b: Blocks) -> Tensor:
    lefts = torch.split(a, [part.shape[1] for part in b.parts], dim=1)
    total = _onednn(lefts[0], _gapless(b.parts[0]))
    for left, right in zip(lefts[1:], b.parts[1:], strict=True):
        total += _onednn(left, _gapless(right))
    return total


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = _ONEDNN(a, b, None, "none", [], "")  # type: ignore[misc]  # asked for by `_by_onednn`
    return product


def working_dtype(dtype: torch.dtype, device: torch.device, *, widens: bool) -> torch.dtype:
    """The dtype in which tiles are multiplied; fp32 for fp16 on a CPU, which has no fast fp16 product."""
    slow = dtype == torch.float16 and device.type == "cpu"
    return torch.float32 if slow or (widens and dtype.itemsize == 2) else dtype


def fresh_memory(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized memory for a large buffer that is written once and read once."""
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < 2**22:
        return like.new_empty(shape, dtype=dtype)
    # Pages of 4 KiB, faulted in one by one, cost as much time as a fifth of what keeping the buffer saves.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
