"""Chooses a kernel for the tensors at hand, and runs it."""

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from orpo_plugins.errors import BatchError
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.types import HeadOptions, HeadResult, Objective
from orpo_plugins.objective import PairLogps
from orpo_plugins.targets import Targets

Record = TypeVar("Record", Targets, PairLogps, HeadResult)


def run_kernel(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    objective: Objective,
    options: HeadOptions,
) -> HeadResult:
    """`Kernel.compute` of the kernel of that name, or of the one that "auto" takes, on operands of one dtype.

    `targets` and `objective` may be on another device than hidden, weight and bias; the result is where they are.

    Raises:
        BatchError: the operands are of several dtypes, and autocast is off.
        ConfigError: an unknown kernel, or one that does not support these tensors.
    """
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    kernel = plugins.kernel(name, hidden, weight)
    here, there = targets.positions.device, hidden.device
    if here == there:
        return kernel.compute(hidden, weight, bias, targets, objective, options)
    # A model that lies on several devices: the head runs on its own, the objective's numbers stay where the batch is.
    moved_objective = Objective(
        nll_weights=objective.nll_weights.to(there),
        pair_loss=lambda pairs: objective.pair_loss(moved(pairs, here)).to(there),
    )
    return moved(kernel.compute(hidden, weight, bias, moved(targets, there), moved_objective, options), here)


def moved(record: Record, device: torch.device) -> Record:
    """`record` with all its tensors on another device."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
    return replace(record, **tensors)


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts to autocast's dtype where it is on, as `torch.nn.Linear` would be; gradients pass through the casts."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    others = [weight] if bias is None else [weight, bias]
    if any(other.dtype != hidden.dtype for other in others):
        found = " and ".join(str(other.dtype) for other in others)
        raise BatchError(
            f"hidden is {hidden.dtype} but {'weight is' if bias is None else 'weight and bias are'} {found}: "
            "cast them to one dtype, or run under torch.autocast"
        )
    return hidden, weight, bias
