"""The fused head in plain PyTorch: the objective and its gradients from one tile of logits at a time.

With l = softcap(scale * (hidden @ weight.T + bias)), J = dl/d(hidden @ weight.T) and p = softmax(l):

    d loss / d (hidden @ weight.T)[t] = w_t * G_t,    G_t = J_t * (onehot_t - p_t)
    w_t = d loss / d logp_t = -nll_weight_t + (d pair_loss / d mean_logp_s) / n_s

Everything about the objective is in the [N] numbers w, and those are known once the log-probabilities are:
autograd gives them on tensors of size [N].  So gradients are computed in the forward, with logits in hand:

    pass 1   for each tile: s_t += sum(exp(l - r_t)),  acc_t += (exp(l - r_t) * J) @ weight        2 products
             logp_t = (l_t[token] - r_t) - log s_t,    d hidden_t = w_t * (J_t[token] * weight[token] - acc_t / s_t)
    pass 2   only for a trainable head, for each tile again: G from the log-sum-exp, d weight = G.T @ (w * hidden)
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_plugins.errors import BatchError
from orpo_plugins.hookspecs import hookimpl
from orpo_plugins.interfaces import HeadOptions, HeadResult, Kernel, Objective
from orpo_plugins.kernels.reference import combine
from orpo_plugins.objective import at_least_fp32
from orpo_plugins.predictions import Predictions

_TOKENS, _VOCABULARY = 512, 2048


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """Runs anywhere."""
    return [Kernel(name="chunked", compute=chunked_head)]


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    predictions: Predictions,
    objective: Objective,
    options: HeadOptions,
) -> HeadResult:
    """See `KernelFunction`."""
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    loss, nll, logps, means = cast(
        tuple[Tensor, Tensor, Tensor, Tensor],
        _ChunkedHead.apply(hidden, weight, bias, predictions, objective, options),  # type: ignore[no-untyped-call]
    )
    return HeadResult(loss=loss, nll_loss=nll, logps=logps, logit_means=means if options.logit_means else None)


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts to autocast's dtype where it is on, as `torch.nn.Linear` would be; gradients pass through the casts."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    others = [weight] if bias is None else [weight, bias]
    if any(other.dtype != hidden.dtype for other in others):
        found = ", ".join(str(other.dtype) for other in others)
        raise BatchError(f"hidden is {hidden.dtype} but weight and bias are {found}: cast them to one dtype")
    return hidden, weight, bias


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        predictions: Predictions,
        objective: Objective,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = _Head(
            hidden=hidden,
            weight=weight,
            bias=bias,
            tokens=predictions.tokens,
            softcap=options.softcap,
            scale=options.logit_scale,
        )
        first = head.scan(need_hidden=ctx.needs_input_grad[0], need_means=options.logit_means)
        loss, nll, means, w = differentiate_objective(first.logps, predictions, objective)
        w, ctx.unit = normalize(w, hidden.dtype)
        d_hidden = head.hidden_gradient(first, w).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_weight, d_bias = head.weight_gradient(
                first, w, need_weight=ctx.needs_input_grad[1], need_bias=ctx.needs_input_grad[2]
            )
        ctx.gradients = [d_hidden, d_weight, d_bias]
        ctx.mark_non_differentiable(nll, means, first.logit_means)
        ctx.set_materialize_grads(False)
        return loss, nll, means, first.logit_means

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None, None, None
        if ctx.gradients is None:
            raise RuntimeError(
                "backward() was called twice on one loss: its gradients were computed in the forward and have been "
                "handed out. Compute the loss again, or add up everything that needs it and call backward() once"
            )
        # In place: a second d_weight would double the peak.  The factor stays fp32, where fp16's loss scale fits.
        gradients = [None if given is None else given.mul_(grad_loss * ctx.unit) for given in ctx.gradients]
        ctx.gradients = None
        return *gradients, None, None, None


def differentiate_objective(
    logps: Tensor, predictions: Predictions, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, NLL, mean log-probabilities [2B], d loss / d logp [N]), all detached, from log-probabilities [N]."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss, nll, means = combine(leaf, predictions, objective)
        (w,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), nll.detach(), means.detach(), w


def normalize(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w / unit, unit): the weights in a unit that keeps every product with them inside a 16-bit dtype.

    A token of a long batch weighs 1e-5 and less, below what fp16 holds to full precision.  In the unit chosen the
    absolute weights sum to 32..64: no product w * hidden vanishes, and no sum over tokens can exceed 64 * max |hidden|.
    The unit is a power of two, so nothing is rounded.
    """
    if dtype.itemsize > 2:
        return w, torch.ones((), dtype=w.dtype, device=w.device)
    total = w.abs().sum().clamp(min=torch.finfo(torch.float32).tiny * 64)
    unit = torch.exp2(torch.ceil(torch.log2(total)) - 6)
    return w / unit, unit


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scan:
    """What the first pass leaves behind, all [N] and at least fp32."""

    logps: Tensor
    log_sum_exp: Tensor
    target_slope: Tensor
    logit_means: Tensor
    expected_rows: Tensor | None
    """[N, H]: (p * J) @ weight, where the gradient of hidden is asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Head:
    """One call's inputs, and the passes over their tiles."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tensor
    softcap: float | None
    scale: float

    def scan(self, *, need_hidden: bool, need_means: bool) -> _Scan:
        """The pass over all tiles that every call needs; see the module's docstring, pass 1."""
        parts = [
            self._scan_tokens(slice(start, start + _TOKENS), need_hidden, need_means)
            for start in range(0, self.hidden.shape[0], _TOKENS)
        ]
        if not parts:
            empty = self.hidden.new_zeros(0, dtype=self._dtype())
            rows = self.hidden.new_zeros(0, self.hidden.shape[1], dtype=self._dtype()) if need_hidden else None
            return _Scan(
                logps=empty, log_sum_exp=empty, target_slope=empty, logit_means=empty.clone(), expected_rows=rows
            )
        return _Scan(
            logps=torch.cat([part.logps for part in parts]),
            log_sum_exp=torch.cat([part.log_sum_exp for part in parts]),
            target_slope=torch.cat([part.target_slope for part in parts]),
            logit_means=torch.cat([part.logit_means for part in parts]),
            expected_rows=torch.cat([cast(Tensor, part.expected_rows) for part in parts]) if need_hidden else None,
        )

    def _scan_tokens(self, lines: slice, need_hidden: bool, need_means: bool) -> _Scan:
        hidden, tokens = self.hidden[lines], self.tokens[lines]
        count, vocabulary = hidden.shape[0], self.weight.shape[0]
        target = hidden.new_zeros(count, dtype=self._dtype())
        top = torch.full_like(target, -torch.inf)
        total, sums = torch.zeros_like(target), torch.zeros_like(target)
        expected = hidden.new_zeros(hidden.shape, dtype=self._dtype()) if need_hidden else None
        for start in range(0, vocabulary, _VOCABULARY):
            columns = slice(start, min(start + _VOCABULARY, vocabulary))
            logits = self._logits(hidden, columns)
            inside = (tokens >= start) & (tokens < columns.stop)
            local = (tokens - start).clamp(0, columns.stop - start - 1)
            target += torch.where(inside, logits.gather(1, local[:, None])[:, 0], 0.0)
            if need_means:
                sums += logits.sum(1)
            higher = torch.maximum(top, logits.amax(1))
            shrink = (top - higher).exp()
            top = higher
            slope = self._slope(logits)
            probabilities = logits.sub_(top[:, None]).exp_()
            total = total * shrink + probabilities.sum(1)
            if expected is not None:
                if slope is not None:
                    probabilities *= slope
                expected *= shrink[:, None]
                expected += probabilities.to(hidden.dtype) @ self.weight[columns]
        log_sum_exp = top + total.log()
        if expected is not None:
            expected /= total[:, None]
        slope = self._slope(target)
        return _Scan(
            logps=target - log_sum_exp,
            log_sum_exp=log_sum_exp,
            target_slope=torch.ones_like(target) if slope is None else slope,
            logit_means=sums / vocabulary,
            expected_rows=expected,
        )

    def hidden_gradient(self, first: _Scan, w: Tensor) -> Tensor:
        """[N, H]: scale * w * (J[token] * weight[token] - (p * J) @ weight)."""
        assert first.expected_rows is not None
        gradient = self.weight[self.tokens] * first.target_slope[:, None]
        return gradient.sub_(first.expected_rows).mul_((w * self.scale)[:, None])

    def weight_gradient(
        self, first: _Scan, w: Tensor, *, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """d weight [V, H] and d bias [V]: one block of the vocabulary after the other, over all tokens."""
        vocabulary = self.weight.shape[0]
        scaled = w * self.scale
        weighted = self.hidden * scaled[:, None].to(self.hidden.dtype)
        d_weight = torch.empty_like(self.weight) if need_weight else None
        d_bias = None if self.bias is None or not need_bias else torch.empty_like(self.bias)
        for start in range(0, vocabulary, _VOCABULARY):
            columns = slice(start, min(start + _VOCABULARY, vocabulary))
            gradient = self._gradient(first, columns)
            if d_bias is not None:
                d_bias[columns] = (scaled @ gradient).to(d_bias.dtype)
            if d_weight is not None:
                torch.mm(gradient.to(weighted.dtype).T, weighted, out=d_weight[columns])
        return d_weight, d_bias

    def _gradient(self, first: _Scan, columns: slice) -> Tensor:
        """G [N, columns]."""
        logits = self._logits(self.hidden, columns)
        slope = self._slope(logits)
        gradient = logits.sub_(first.log_sum_exp[:, None]).exp_().neg_()
        inside = (self.tokens >= columns.start) & (self.tokens < columns.stop)
        local = (self.tokens - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None]
        gradient.scatter_(1, local, gradient.gather(1, local) + inside[:, None])
        return gradient if slope is None else gradient.mul_(slope)

    def _logits(self, hidden: Tensor, columns: slice) -> Tensor:
        """Final logits [tokens, columns], at least fp32, in memory of their own."""
        logits = at_least_fp32(hidden @ self.weight[columns].T)
        if self.bias is not None:
            logits += self.bias[columns]
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def _slope(self, logits: Tensor) -> Tensor | None:
        """The soft-cap's derivative from its own value: 1 - (l / c)^2."""
        return None if self.softcap is None else 1.0 - (logits / self.softcap).square()

    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
