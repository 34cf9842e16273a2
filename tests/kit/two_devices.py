"""A second device for tests on a CPU: tensors that say that they are on it, and do not mix with others."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, OTHER = torch.device("cpu"), torch.device("cpu", 1)
_ACROSS = ("to", "cpu", "copy_")


def device_of(tensor: Tensor) -> torch.device:
    return getattr(tensor, "on_device", CPU)


def put_on_other(module: nn.Module) -> None:
    """What `Module.to` would do."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.on_device = OTHER


class TwoDevices(TorchFunctionMode):
    """While entered, operations on tensors of two devices raise what torch raises for two GPUs.

    As there, a tensor without dimensions mixes with others only on the CPU, and indices of two kinds do not mix.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return device_of(args[0])
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "")
        found = {device_of(tensor) for tensor in tensors if tensor.dim() or device_of(tensor) == OTHER}
        if len(found) > 1 and name not in _ACROSS:
            places = [(tuple(tensor.shape), device_of(tensor)) for tensor in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device, but found two in {name}: {places}")
        asked = [torch.device(leaf) for leaf in leaves if isinstance(leaf, torch.device)]
        if name == "to" and len(tensors) > 1:
            asked.append(device_of(tensors[1]))
        if name in ("cpu", "copy_"):
            asked = [CPU if name == "cpu" else device_of(args[0])]
        device = asked[0] if asked else next(iter(found), CPU)
        args, kwargs = tree_map(lambda leaf: CPU if isinstance(leaf, torch.device) else leaf, (args, kwargs))
        out = func(*args, **kwargs)
        if name in ("to", "cpu") and out is args[0] and device_of(out) != device:
            out = out.view_as(out)  # a copy, as another device would need one
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                tensor.on_device = device
        return out
