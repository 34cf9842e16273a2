"""The fused head for CUDA devices, kernel "triton": cuBLAS products, and Triton for the rest of each tile."""

import importlib.util

import torch
from torch import Tensor

from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import HeadOptions, HeadResult, Kernel, Objective
from orpo_plugins.kernels import reference
from orpo_plugins.kernels.fused_head import fused_head
from orpo_plugins.kernels.tile_steps import TorchSteps
from orpo_plugins.targets import Targets


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """What "auto" takes on a CUDA device where triton is installed."""
    return [Kernel(name="triton", compute=triton_head, unsupported=unsupported, priority=10)]


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot run on these tensors."""
    if reason := reference.unsupported(hidden, weight):
        return reason
    if hidden.device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {hidden.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(hidden.device) < (7, 0):
        return "triton needs compute capability 7.0"
    return None


def triton_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    objective: Objective,
    options: HeadOptions,
) -> HeadResult:
    """See `KernelFunction`, and `fused_head` for `memory_budget`."""
    from orpo_plugins.kernels.triton_steps import TritonSteps

    steps = TorchSteps if hidden.dtype == torch.float64 else TritonSteps
    with _on(hidden.device):
        return fused_head(hidden, weight, bias, targets, objective, options, steps=steps)


def _on(device: torch.device) -> torch.cuda.device:
    # Triton launches on the current device, which need not be the tensors' one; -1 changes nothing.
    return torch.cuda.device(device if device.type == "cuda" else -1)
