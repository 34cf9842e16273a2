"""The tensors of one call of the fused head, and products of their tiles."""

import torch
from torch import Tensor

from orpo_plugins.kernels.products import Blocks, product_minus_center, times_transposed, working_dtype
from orpo_plugins.kernels.tile_steps import Tile, TileSteps, Transform, target_logits
from orpo_plugins.kernels.tiling import Tiling, cut


class Operands:
    """Hidden states [M, H], weight [V, H], bias [V], and for each of the N targets its position and its token.

    Two dtypes occur: `dtype`, in which tiles are multiplied, and `wide`, fp32 or fp64, for all else.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        positions: Tensor,
        token_ids: Tensor,
        transform: Transform,
        tiling: Tiling,
        steps: TileSteps,
    ) -> None:
        self.dtype = working_dtype(hidden.dtype, hidden.device, fp32_products=steps.fp32_products)
        self.wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self._hidden, self.weight, self.positions, self.token_ids = hidden, weight, positions, token_ids
        self.bias = None if bias is None else bias.to(self.wide)
        self.transform, self.tiling, self.steps = transform, tiling, steps
        # With a bias the largest logits say little about the largest products.
        self.centered = self.dtype == torch.bfloat16 and not hidden.is_cuda and steps.takes_centers and bias is None
        self._memory: dict[str, Tensor] = {}

    def gather(self, targets: slice) -> Tensor:
        """[targets, H]: hidden states in the working dtype."""
        return self._hidden.index_select(0, self.positions[targets]).to(self.dtype)

    def target_logits(self) -> tuple[Tensor, Tensor | None]:
        """[N]: the logit of each target's token in base 2, by a dot product in fp32, and tanh's slope there."""
        products = torch.empty_like(self.token_ids, dtype=self.wide)
        for targets in cut(len(self.positions), self.tiling.piece):
            products[targets] = self.target_weights(targets).mul_(self.gather(targets)).sum(1)
        return target_logits(products, None if self.bias is None else self.bias[self.token_ids], self.transform)

    def target_weights(self, targets: slice) -> Tensor:
        """[targets, H], wide: the weight's row of each target's token."""
        return self.weight[self.token_ids[targets]].to(self.wide)

    def tile_of_weight(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """[columns, H] in the working dtype, and the bias."""
        return self.weight[columns].to(self.dtype), None if self.bias is None else self.bias[columns]

    def center(self, running_max: Tensor) -> Tensor | None:
        """[targets]: what to subtract from a target's products, about the largest of them; None for nothing.

        A CPU rounds the results of bf16 products to bf16.  What is rounded relative to the largest product has large
        errors only where probabilities are small.  The center is fp32, of values that bf16 holds.
        """
        return self.transform.inverse(running_max).to(self.dtype).float() if self.centered else None

    def products(self, a: Tensor, b: Tensor | Blocks, center: Tensor | None) -> Tensor:
        """a @ b.T - center.  The memory is used again by the next call."""
        memory = self._reused("products", len(a), len(b))
        if memory is None and self.steps.alignment > 1:
            memory = self.tile_memory(len(a), len(b), self.wide)
        if center is None:
            return times_transposed(a, b, memory)
        assert isinstance(b, Tensor)  # blocks are for fp32, centers for bf16
        return product_minus_center(a, b, center, memory)

    def tile(
        self, products: Tensor, center: Tensor | None, bias: Tensor | None, targets: slice, columns: slice
    ) -> Tile:
        """The tile of some products, with the columns of the targets' tokens."""
        target_columns = self.token_ids[targets] - columns.start
        return Tile(
            products=products, center=center, bias=bias, target_columns=target_columns, transform=self.transform
        )

    def wide_product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b.T in fp32 (fp64), exactly where the device can.  The memory is used again by the next call."""
        product = times_transposed(a, b, self._reused("product", len(a), len(b)))
        if product.dtype.itemsize > 2:
            return product
        wide = self._reused("wide product", len(a), len(b), torch.float32)
        return product if wide is None else wide.copy_(product)

    def _reused(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Memory for results that a CPU leaves in bf16; None where products come wide, in memory of their own."""
        # A new buffer per tile would be handed back to the system and faulted in again, page by page.
        if self.dtype != torch.bfloat16 or self._hidden.is_cuda:
            return None
        memory = self._memory.get(name)
        if memory is None or memory.numel() < rows * columns:
            memory = self._memory[name] = self._hidden.new_empty(rows * columns, dtype=dtype or self.dtype)
        return memory[: rows * columns].view(rows, columns)

    def like(self, products: Tensor) -> Tensor:
        """Where a tile goes in order to be multiplied: `products` itself unless it is too wide."""
        if products.dtype == self.dtype:
            return products
        return self.tile_memory(len(products), products.shape[1], self.dtype)

    def tile_memory(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns], not yet written, with rows padded to `TileSteps.alignment`."""
        return self.weight.new_empty(rows, self.padded(columns), dtype=dtype)[:, :columns]

    def padded(self, count: int) -> int:
        """The next multiple of `TileSteps.alignment`."""
        return count + -count % self.steps.alignment
