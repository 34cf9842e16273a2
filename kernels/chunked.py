"""The fused head in plain PyTorch, for every device: kernels "chunked" and "chunked_fp32"."""

from functools import partial

from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Kernel, KernelFunction
from orpo_plugins.kernels.fused_head import fused_head
from orpo_plugins.kernels.reference import unsupported
from orpo_plugins.kernels.tile_steps import TorchSteps

chunked_head: KernelFunction = partial(fused_head, steps=TorchSteps)

# Its gradients are those of exact arithmetic, rounded once to 16 bits, in the time that fp32 operands take.  A CPU
# rounds the results of bf16 products to bf16; on a GPU they come in fp32 without this.
chunked_fp32_head: KernelFunction = partial(fused_head, steps=partial(TorchSteps, fp32_products=True))


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """Both run anywhere; "auto" takes the first, where there is nothing better."""
    return [
        Kernel(name="chunked", compute=chunked_head, unsupported=unsupported),
        Kernel(name="chunked_fp32", compute=chunked_fp32_head, unsupported=unsupported, priority=-10),
    ]
