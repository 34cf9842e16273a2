"""The fused head: the objective and all its gradients in the forward pass, from one tile of logits at a time.

In naive form (`reference.py`), for N targets, each with its position, its token y and its answer:

    x = hidden[positions] @ weight.T + bias                 [N, V]
    logits = softcap * tanh(scale * x / softcap)            [N, V], or scale * x
    logps = logits.log_softmax(-1).gather(-1, y)            [N]
    means = sum of logps over an answer / its tokens n      [2B]
    loss = -sum(nll_weights * logps) + pair_loss(means)

With the paper's names (Hong, Lee and Thorne 2024, arXiv:2403.07691): means is log P(y|x) of equation 3, for y_w
(chosen) and y_l (rejected); the first term of the loss is L_SFT; pair_loss is lambda * L_OR, or any other function.

The loss depends on the logits through the N numbers logps alone.  So, with p = softmax(logits) and J = d logits / d x:

    w_t = d loss / d logps_t = -nll_weights_t + (d pair_loss / d means_s) / n_s
    d loss / d x_t = w_t * J_t * (onehot(y_t) - p_t)

All that is special about an objective is in w [N].  Autograd gives it on tensors of size [N], once the logps are
known; by then the tiles are gone.  But w_t is one number for a whole row of logits.  So it is multiplied into rows
of hidden states and of their gradient, and no matrix of the vocabulary's width is ever scaled by it.

Steps:

    1. `scan.py`: one pass over all tiles gives logps and d logps / d hidden     matrix products 1 and 2
    2. the objective and w, from logps
    3. `hidden_gradient.py`: d logps / d hidden, which has waited for w, times w
    4. `weight_gradient.py`, for a trainable head: d weight, from tiles that the scan has kept (matrix product 3), or
       from tiles that are computed again (products 3 and 4)

`tiling.py` draws how the logits are cut.  `tile_steps.py` is the arithmetic on one tile; kernels differ in it alone:
"chunked" takes `TorchSteps`, "triton" takes `TritonSteps`.

Numerics.  The target's own entry is left out of the sum of exponentials, and its logit is a dot product in fp32:
log p = -log1p(exp_sum / exp_target), so that log p <= 0 holds for every rounding and 1 - p keeps its digits where p is
close to 1.  The running maximum is rounded up to an integer: a new one multiplies by a power of two, which rounds
nothing.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_plugins.hooks.types import HeadOptions, HeadResult, Objective
from orpo_plugins.kernels.hidden_gradient import HiddenGradient
from orpo_plugins.kernels.operands import Operands
from orpo_plugins.kernels.reference import combine
from orpo_plugins.kernels.scan import Scan
from orpo_plugins.kernels.tile_steps import TileSteps, Transform
from orpo_plugins.kernels.tiling import Tiling
from orpo_plugins.kernels.weight_gradient import WeightGradient
from orpo_plugins.targets import Targets

_LOG2_SUM_FP16 = 6
"""In fp16 the weights w are scaled so that their absolute values sum to at most 2^6; see `in_safe_unit`."""


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    objective: Objective,
    options: HeadOptions,
    *,
    steps: Callable[[], TileSteps],
) -> HeadResult:
    """The algorithm of this module, a `KernelFunction` once `steps` gives the arithmetic on tiles.

    Shapes, dtypes: as `KernelFunction` has them; fp64, fp32, bf16 or fp16.  Gradients come in the dtypes of the inputs.

    Memory: the returned gradients, a few tiles, and what `memory_budget` buys.  Each byte of the budget beyond the
    working set of a few tiles keeps tiles, which saves its share of the fourth matrix product of a trainable head.
    The default is 2.5 times the returned weight gradient where tiles are multiplied in 16 bits.  It is nothing where
    they are wider (fp16 on a CPU too), and take twice the memory for the same saving.  A budget below the working set
    makes the tiles smaller, and the head slower.

    Raises:
        RuntimeError: a second `backward()` on one loss.
    """
    if not torch.is_grad_enabled():  # needs_input_grad below does not know about no_grad
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss, nll, means, logit_means = cast(
        tuple[Tensor, Tensor, Tensor, Tensor | None],
        _FusedHead.apply(hidden, weight, bias, targets, objective, options, steps()),  # type: ignore[no-untyped-call]  # torch's
    )
    return HeadResult(loss=loss, nll_loss=nll, logps=means, logit_means=logit_means)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        objective: Objective,
        options: HeadOptions,
        steps: TileSteps,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        need_hidden, need_weight, need_bias = needs = ctx.needs_input_grad[:3]
        trainable = need_weight or need_bias
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen already
            count = len(targets.positions)
            positions, token_ids = (repeat_last(x, steps.alignment) for x in (targets.positions, targets.token_ids))
            gradient = HiddenGradient.from_options(hidden, positions, options) if need_hidden else None
            order = None if gradient is None else gradient.order
            inputs = Operands(
                hidden,
                weight,
                bias,
                positions=in_order(positions, order),
                token_ids=in_order(token_ids, order),
                transform=Transform.from_options(options),
                tiling=Tiling.plan(
                    len(positions), weight, options, trainable=trainable, fp32_products=steps.fp32_products
                ),
                steps=steps,
            )
            scan = Scan(inputs, need_means=options.logit_means, need_weight=trainable).run(gradient)
            logit_means = None if scan.logit_means is None else in_table_order(scan.logit_means, order)[:count]
            logps = in_table_order(scan.logps, order)[:count]
            loss, nll, means, w = differentiate_objective(logps, targets, objective, need_w=any(needs))
            w = F.pad(w, (0, len(positions) - count))  # what was repeated weighs nothing
            w, ctx.unit = in_safe_unit(in_order(w, order), hidden.dtype)
            piece = inputs.tiling.piece
            d_hidden = None if gradient is None else gradient.finish(w * inputs.transform.derivative, piece)
            d_weight = WeightGradient.compute(inputs, scan, w, need_weight=need_weight, need_bias=need_bias)
            ctx.gradients = [d_hidden, *d_weight]
        ctx.mark_non_differentiable(nll, means, *([] if logit_means is None else [logit_means]))
        ctx.set_materialize_grads(False)
        return loss, nll, means, logit_means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        if ctx.gradients is None:
            raise RuntimeError(
                "backward() was called twice on one loss: its gradients were computed in the forward and have been "
                "handed out. Compute the loss again, or add up all that needs it and call backward() once"
            )
        factor = grad_loss if ctx.unit is None else grad_loss * ctx.unit
        gradients, ctx.gradients = ctx.gradients, None
        if factor.is_cuda or float(factor) != 1.0:  # on a GPU the question would take longer than the product
            # In place, since a second d_weight would double the peak.  In fp32, since 16 bits hold neither a loss scale
            # nor 1/3: CUDA would round a factor without a dimension to the gradient's dtype, a CPU does not.
            factor = factor.view(1) if factor.is_cuda else factor
            gradients = [None if given is None else given.mul_(factor) for given in gradients]
        return *gradients, None, None, None, None


def repeat_last(values: Tensor, multiple: int) -> Tensor:
    """[N]: `values` with the last one repeated, up to a number of values that `multiple` divides."""
    return torch.cat([values, values[-1:].expand(-len(values) % multiple)]) if len(values) % multiple else values


def in_order(values: Tensor, order: Tensor | None) -> Tensor:
    """values[order], the order in which targets are read; `in_table_order` is the inverse."""
    return values if order is None else values[order]


def in_table_order(values: Tensor, order: Tensor | None) -> Tensor:
    """From the order in which targets were read to that of the table."""
    return values if order is None else torch.empty_like(values).index_copy_(0, order, values)


def differentiate_objective(
    logps: Tensor, targets: Targets, objective: Objective, *, need_w: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, NLL, mean log-probabilities [2B], w = d loss / d logps [N]), all detached; w is zero if not needed."""
    with torch.set_grad_enabled(need_w):
        leaf = logps.detach().requires_grad_(need_w)
        loss, nll, means = combine(leaf, targets, objective)
        w = torch.autograd.grad(loss, leaf)[0] if need_w else torch.zeros_like(logps)
    return loss.detach(), nll.detach(), means.detach(), w


def in_safe_unit(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(w / unit, unit), with a unit in which every product with w stays inside fp16; None for 1.

    A token of a long batch weighs 1e-5 and less, below what fp16 holds to full precision.  In the unit chosen the
    absolute weights sum to 32..64: no product w * hidden vanishes, and no sum over tokens exceeds 64 * max |hidden|.
    The unit is a power of two, so nothing is rounded.
    """
    if dtype != torch.float16:
        return w, None
    total = w.abs().sum().clamp(min=2**_LOG2_SUM_FP16 * torch.finfo(w.dtype).tiny)
    unit = torch.exp2(torch.ceil(torch.log2(total)) - _LOG2_SUM_FP16)
    return w / unit, unit
