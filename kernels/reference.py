"""The obvious head: all logits at once, log-softmax in fp32, autograd for everything.

Every other kernel is compared with it.  It also serves models whose logits are no simple function of
`hidden @ weight.T + bias`, through `objective_of_logits`.
"""

import sys

import torch
from torch import Tensor

from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import HeadOptions, HeadResult, Kernel, Objective
from orpo_plugins.objective import PairLogps, at_least_fp32
from orpo_plugins.targets import Targets

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """Runs anywhere; never chosen by "auto"."""
    return [Kernel(name="reference", compute=reference_head, unsupported=unsupported, priority=-100)]


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
    """Why no built-in kernel can run on these tensors; None where all of them can that need no certain device."""
    tensor_module = sys.modules.get("torch.distributed.tensor")  # no DTensor exists before it is imported
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor_module is not None and isinstance(tensor, tensor_module.DTensor):
            return f"{name} is a DTensor, sharded as {tensor.placements}, and each rank would see its own part alone"
        if tensor.device.type == "meta":
            return f"{name} is on the device meta, which holds no numbers"
        if tensor.dtype not in _DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which is not fp16, bf16, fp32 or fp64"
    return None


def reference_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    objective: Objective,
    options: HeadOptions,
) -> HeadResult:
    """See `KernelFunction`.  Memory: several matrices [N, V], in the dtype of `hidden` and in fp32."""
    hidden = hidden.index_select(0, targets.positions)
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return objective_of_logits(transform_logits(logits, options), targets, objective)


def transform_logits(logits: Tensor, options: HeadOptions) -> Tensor:
    """c * tanh(scale * logits / c), or scale * logits without a soft-cap."""
    logits = logits * options.logit_scale
    if options.softcap is None:
        return logits
    return options.softcap * (logits / options.softcap).tanh()


def objective_of_logits(logits: Tensor, targets: Targets, objective: Objective) -> HeadResult:
    """The objective from final logits [N, V], one row per target of `targets`."""
    logps = at_least_fp32(logits).log_softmax(-1).gather(-1, targets.token_ids[:, None])[:, 0]
    loss, nll, means = combine(logps, targets, objective)
    return HeadResult(
        loss=loss, nll_loss=nll.detach(), logps=means.detach(), logit_means=at_least_fp32(logits.detach()).mean(-1)
    )


def combine(logps: Tensor, targets: Targets, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, NLL, mean log-probabilities [2B]) from per-target log-probabilities [N]; differentiable in `logps`."""
    lengths = targets.answer_lengths()
    # 0 / 1 and not 0 / 0 where a pair has no rejected answer: NaN would get into the gradient of all targets.
    means = targets.sum_by_sequence(logps * targets.in_answer) / lengths.clamp(min=1)
    # In fp64 where there is one (MPS has none): the sum runs over all tokens of a batch.
    widest = logps.dtype if logps.device.type == "mps" else torch.float64
    nll = -(objective.nll_weights * logps).sum(dtype=widest).to(logps.dtype)
    (chosen, rejected), (chosen_lengths, rejected_lengths) = means.view(2, -1), lengths.view(2, -1)
    pairs = PairLogps(
        chosen=chosen, rejected=rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    return nll + objective.pair_loss(pairs), nll, means
