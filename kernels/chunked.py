"""The fused head: the objective and its gradients in the forward, from one tile of logits at a time.

With l = softcap(scale * (hidden @ weight.T + bias)), J = dl / d(hidden @ weight.T) and p = softmax(l):

    w_t = d loss / d logp_t = -nll_weight_t + (d pair_loss / d mean_logp_s) / n_s
    d loss / d (hidden @ weight.T)[t] = w_t * J_t * (onehot_t - p_t)

Everything that is special about the objective is in the numbers w [N], and these come from autograd on tensors of
size [N] once the log-probabilities are known.  So no matrix of the vocabulary's width is ever scaled by w.

    scan.py             one pass over all tiles: log-probabilities, and d logp / d hidden (matrix products 1 and 2)
    hidden_gradient.py  keeps d logp / d hidden until w is known, then multiplies
    weight_gradient.py  only for a trainable head: d weight from tiles that the scan kept (matrix product 3), or from
                        tiles that are computed again (products 3 and 4)

Numerics.  The target's own entry is left out of the sum of exponentials, and its logit is a dot product in fp32:
log p = -log1p(exp_sum / exp_target), so that log p <= 0 holds for every rounding and 1 - p keeps its digits where p is
close to 1.  The running maximum is rounded up to an integer: a new one multiplies by a power of two, which rounds
nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import HeadOptions, HeadResult, Kernel, KernelFunction, Objective
from orpo_plugins.kernels.hidden_gradient import HiddenGradient
from orpo_plugins.kernels.operands import Operands
from orpo_plugins.kernels.reference import combine, unsupported
from orpo_plugins.kernels.scan import scan
from orpo_plugins.kernels.tile_steps import EagerSteps, TileSteps, Transform
from orpo_plugins.kernels.tiling import Tiling
from orpo_plugins.kernels.weight_gradient import WeightGradient
from orpo_plugins.targets import Targets


def tiled_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    objective: Objective,
    options: HeadOptions,
    *,
    steps: Callable[[], TileSteps],
) -> HeadResult:
    """The algorithm of this module, a `KernelFunction` once the arithmetic on tiles is given by `steps`.

    `memory_budget` buys kept tiles: each byte beyond the working set of a few tiles saves its share of the fourth
    matrix product of a trainable head.  The default is 2.5 times the returned weight gradient for 16-bit dtypes and
    nothing for wider ones, whose tiles take twice the memory for the same saving.  A budget below the working set
    makes the tiles smaller, and the head slower.
    """
    if not torch.is_grad_enabled():  # needs_input_grad below does not know about no_grad
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss, nll, logps, means = cast(
        tuple[Tensor, Tensor, Tensor, Tensor | None],
        _TiledHead.apply(hidden, weight, bias, targets, objective, options, steps()),  # type: ignore[no-untyped-call]
    )
    return HeadResult(loss=loss, nll_loss=nll, logps=logps, logit_means=means)


chunked_head: KernelFunction = partial(tiled_head, steps=EagerSteps)

# Its gradients are those of exact arithmetic, rounded once to 16 bits, in the time that fp32 operands take.  A CPU
# rounds the results of bf16 products to bf16; on a GPU they come in fp32 without this.
chunked_fp32_head: KernelFunction = partial(tiled_head, steps=partial(EagerSteps, widens=True))


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """Both run anywhere; "auto" takes the first, where there is nothing better."""
    return [
        Kernel(name="chunked", compute=chunked_head, unsupported=unsupported),
        Kernel(name="chunked_fp32", compute=chunked_fp32_head, unsupported=unsupported, priority=-10),
    ]


class _TiledHead(torch.autograd.Function):
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
            tiling = Tiling.plan(len(targets.positions), weight, options, trainable=trainable, widens=steps.widens)
            gradient = HiddenGradient.of(hidden, targets.positions, options) if need_hidden else None
            order = None if gradient is None else gradient.order
            rows, tokens = reordered(targets.positions, order), reordered(targets.token_ids, order)
            inputs = Operands(hidden, weight, bias, rows, tokens, Transform.of(options), tiling, steps)
            found = scan(inputs, gradient, need_means=options.logit_means, need_weight=trainable)
            logit_means = None if found.logit_means is None else in_table_order(found.logit_means, order)
            loss, nll, means, w = differentiate(
                in_table_order(found.logps, order), targets, objective, need_w=any(needs)
            )
            w, ctx.unit = in_safe_unit(reordered(w, order), hidden.dtype)
            d_hidden = None if gradient is None else gradient.finish(w * inputs.transform.derivative, tiling.piece)
            d_weight = WeightGradient.compute(inputs, found, w, need_weight=need_weight, need_bias=need_bias)
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
            # In place, since a second d_weight would double the peak; in fp32, since fp16 holds no loss scale.
            gradients = [None if given is None else given.mul_(factor) for given in gradients]
        return *gradients, None, None, None, None


def reordered(values: Tensor, order: Tensor | None) -> Tensor:
    """values[order]; `put_back` is the inverse."""
    return values if order is None else values[order]


def in_table_order(values: Tensor, order: Tensor | None) -> Tensor:
    """From the order in which targets were read to that of the table."""
    return values if order is None else torch.empty_like(values).index_copy_(0, order, values)


def differentiate(
    logps: Tensor, targets: Targets, objective: Objective, *, need_w: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, NLL, mean log-probabilities [2B], w = d loss / d logp [N]), all detached; w is zero if not needed."""
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
    total = w.abs().sum().clamp(min=64 * torch.finfo(w.dtype).tiny)
    unit = torch.exp2(torch.ceil(torch.log2(total)) - 6)
    return w / unit, unit
