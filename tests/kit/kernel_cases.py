"""Cases for head kernels: ragged batches, and one run of `linear_orpo_loss` with its gradients."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orpo_plugins import linear_orpo_loss
from orpo_plugins.objective import ORPOOutput


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One call's tensors."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    nll_labels: Tensor | None = None
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        """The same case in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


def make_case(
    *,
    pairs: int = 2,
    length: int = 9,
    width: int = 17,
    vocabulary: int = 131,
    scale: float = 1.0,
    bias: bool = False,
    ignored: float = 0.3,
    prompt: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random tensors; `ignored` is the share of positions without a label, of which each answer keeps at least one.

    With `prompt`, that many positions stand in the NLL labels alone.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, length, width, generator=generator) * scale
    weight = torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(vocabulary, (2 * pairs, length), generator=generator)
    last = labels[:, -1].clone()
    labels[torch.rand(labels.shape, generator=generator) < ignored] = -100
    labels[:, -1] = last
    nll_labels = None
    if prompt:
        nll_labels = labels[:pairs].clone()
        nll_labels[:, :prompt] = torch.randint(vocabulary, (pairs, prompt), generator=generator)
        labels[:, :prompt] = -100
    offset = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    return Case(hidden=hidden.to(dtype), weight=weight.to(dtype), labels=labels, nll_labels=nll_labels, bias=offset)


def run_case(
    case: Case, *, needs: tuple[str, ...] = ("hidden", "weight", "bias"), upstream: float = 1.0, **options: Any
) -> tuple[ORPOOutput, dict[str, Tensor]]:
    """(output, gradients by name) of `linear_orpo_loss`, on fresh leaves, of which those in `needs` get a gradient."""
    found = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {
        name: tensor.detach().clone().requires_grad_(name in needs)
        for name, tensor in found.items()
        if tensor is not None
    }
    output = linear_orpo_loss(
        leaves["hidden"],
        leaves["weight"],
        case.labels,
        nll_labels=case.nll_labels,
        bias=leaves.get("bias"),
        **options,
    )
    if output.loss.requires_grad:
        (output.loss * upstream).backward()
    return output, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
