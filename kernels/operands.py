"""The tensors of one call of the fused head, and products of their tiles."""

import torch
from torch import Tensor

from orpo_plugins.kernels.products import Blocks, product_less, times_transposed, working_dtype
from orpo_plugins.kernels.tile_steps import Tile, TileSteps, Transform, bent_targets
from orpo_plugins.kernels.tiling import Tiling, blank, cut


class Operands:
    """Inputs; lines in the order of `rows` [N] and `tokens` [N]."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        tokens: Tensor,
        transform: Transform,
        tiling: Tiling,
        steps: TileSteps,
    ) -> None:
        self.dtype = working_dtype(hidden.dtype, hidden.device, widens=steps.widens)
        self.wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self._hidden, self.weight, self.rows, self.tokens = hidden, weight, rows, tokens
        self.bias = None if bias is None else bias.to(self.wide)
        self.transform, self.tiling, self.steps = transform, tiling, steps
        # With a bias the largest logits say little about the largest products.
        self.centered = self.dtype == torch.bfloat16 and not hidden.is_cuda and steps.takes_centers and bias is None
        self._memory: dict[str, Tensor] = {}

    def gather(self, lines: slice) -> Tensor:
        """[lines, H]: hidden states in the working dtype."""
        return self._hidden.index_select(0, self.rows[lines]).to(self.dtype)

    def target_logits(self) -> tuple[Tensor, Tensor | None]:
        """[N]: each line's target logit in base 2, by a dot product in fp32, and tanh's slope there."""
        raw = torch.empty_like(self.tokens, dtype=self.wide)
        for lines in cut(len(self.rows), self.tiling.piece):
            raw[lines] = self.target_weights(lines).mul_(self.gather(lines)).sum(1)
        return bent_targets(raw, None if self.bias is None else self.bias[self.tokens], self.transform)

    def target_weights(self, lines: slice) -> Tensor:
        """[lines, H], wide: the weight's row of each line's target."""
        return self.weight[self.tokens[lines]].to(self.wide)

    def tile_of_weight(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """[columns, H] in the working dtype, and the bias."""
        return self.weight[columns].to(self.dtype), None if self.bias is None else self.bias[columns]

    def center(self, reference: Tensor) -> Tensor | None:
        """[lines]: what to take off the raw products of a line whose largest logits are about `reference`.

        Where results of bf16 products are rounded to bf16, as on a CPU: rounded relative to the largest, the errors
        are large only where probabilities are small.  fp32, of values that bf16 holds.
        """
        return self.transform.raw_near(reference).to(self.dtype).float() if self.centered else None

    def raw(self, a: Tensor, b: Tensor | Blocks, center: Tensor | None) -> Tensor:
        """a @ b.T - center, in memory of its own until the next call."""
        memory = self._reused("raw", len(a), len(b))
        if center is None:
            return times_transposed(a, b, memory)
        assert isinstance(b, Tensor)
        return product_less(a, b, center, memory)

    def tile(self, raw: Tensor, center: Tensor | None, bias: Tensor | None, lines: slice, columns: slice) -> Tile:
        """Raw products of some lines and columns, with the lines' targets."""
        targets = self.tokens[lines] - columns.start
        return Tile(raw=raw, center=center, bias=bias, targets=targets, transform=self.transform)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b.T in the widest dtype at hand, in memory of its own until the next call."""
        product = times_transposed(a, b, self._reused("product", len(a), len(b)))
        if product.dtype.itemsize > 2:
            return product
        wide = self._reused("wide product", len(a), len(b), torch.float32)
        return product if wide is None else wide.copy_(product)

    def _reused(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Memory for results that a CPU leaves in bf16; None where products come wide, in memory of their own."""
        # New memory for each tile would be handed back to the system and faulted in again, page by page.
        if self.dtype != torch.bfloat16 or self._hidden.is_cuda:
            return None
        memory = self._memory.get(name)
        if memory is None or memory.numel() < rows * columns:
            memory = self._memory[name] = blank((rows * columns,), self._hidden, dtype or self.dtype)
        return memory[: rows * columns].view(rows, columns)

    def like(self, raw: Tensor) -> Tensor:
        """Where a tile goes to be multiplied: `raw` itself unless it is too wide."""
        return raw if raw.dtype == self.dtype else torch.empty_like(raw, dtype=self.dtype)
