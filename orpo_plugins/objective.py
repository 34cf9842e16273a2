"""The ORPO objective on mean log-probabilities (Hong, Lee and Thorne 2024, arXiv:2403.07691, equations 4 to 7).

p = exp(mean log-probability of the answer's tokens)
log_odds = (log p_c - log p_r) - (log(1 - p_c) - log(1 - p_r))
loss = NLL(chosen) - beta * mean over pairs of log sigmoid(odds_temperature * log_odds)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_plugins.errors import BatchError, ConfigError

_MINUS_LN_2 = -0.6931471805599453

NumberT = TypeVar("NumberT", Tensor, float)


@dataclass(frozen=True, kw_only=True, eq=False)
class ORPOOutput:
    """The result of the objective.  Where a kernel computed it, only `loss` carries a gradient."""

    loss: Tensor
    """Scalar to call `backward()` on."""
    nll_loss: Tensor
    """Scalar: the weighted NLL of the chosen sequences."""
    chosen_logps: Tensor
    """fp32 [B]: mean log-probability per answer token."""
    rejected_logps: Tensor
    """fp32 [B]: the same for the rejected answers.  For a pair without one, this and the two below are NaN."""
    log_odds_chosen: Tensor
    """fp32 [B]: log odds of the chosen over the rejected answer (TRL's metric of this name is its mean)."""
    log_odds_ratio: Tensor
    """fp32 [B]: log sigmoid(odds_temperature * log_odds_chosen - margin)."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further detached values: answer lengths, weights, NLL tokens, logit means, a router's auxiliary loss."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairLogps:
    """The arguments of a per-pair term.  All fp32 [B]."""

    chosen: Tensor
    """Mean log-probability of the chosen answer's tokens; carries gradient."""
    rejected: Tensor
    """The same for the rejected answer."""
    chosen_lengths: Tensor
    """Number of answer tokens: `chosen * chosen_lengths` is the summed log-probability."""
    rejected_lengths: Tensor
    """The same for the rejected answer."""


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """A per-pair term that a plugin brings, and that the option `loss_terms` adds to the objective by its name."""

    name: str
    compute: Callable[[PairLogps], Tensor]
    """Maps `PairLogps` to [B], to be minimized; the mean over pairs enters the loss, times its weight."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, with finite value and gradient for every input.

    The two branches are those of Maechler 2012: log1p below -ln 2, expm1 above.

    The backward of `torch.where` sends a gradient of 0 into the branch not taken, and 0 * inf is NaN there.  So the
    input of each branch is clamped to where the branch is finite.  At x = 0 the true value is -inf; x is clamped to
    -eps/4 of its dtype, where exp(x) rounds to 1.
    """
    ceiling = -torch.finfo(x.dtype).eps / 4
    x = x.clamp(max=ceiling)
    small = torch.log1p(-torch.exp(x.clamp(max=_MINUS_LN_2)))
    large = torch.log(-torch.expm1(x.clamp(min=_MINUS_LN_2)))
    return torch.where(x < _MINUS_LN_2, small, large)


def log_odds(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """[B] log odds of the chosen answer minus those of the rejected one."""
    return (chosen_logps - rejected_logps) - (log1mexp(chosen_logps) - log1mexp(rejected_logps))


def odds_ratio_loss(pairs: PairLogps, *, beta: float, odds_temperature: float, margins: Tensor | float = 0.0) -> Tensor:
    """[B]: -beta * log sigmoid(odds_temperature * log_odds - margins), the term that ORPO adds to the NLL.

    `margins` [B] are 0 in the paper.  The log odds of each pair have to exceed its margin, as in TRL's reward trainer.
    """
    return -beta * F.logsigmoid(odds_temperature * log_odds(pairs.chosen, pairs.rejected) - margins)


def loss_of_means(nll_loss: NumberT, log_odds_ratio: NumberT, beta: float) -> NumberT:
    """nll_loss - beta * log_odds_ratio: the whole objective, of means over pairs (tensors or numbers)."""
    return nll_loss - beta * log_odds_ratio


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    nll_loss: Tensor,
    *,
    beta: float = 0.1,
    odds_temperature: float = 1.0,
) -> ORPOOutput:
    """The objective alone, differentiable in all three tensors.

        loss = nll_loss - beta * mean(log sigmoid(odds_temperature * log_odds(chosen_logps, rejected_logps)))

    Args:
        chosen_logps: [B] mean (not summed) log-probability of each chosen answer's tokens, <= 0.
        rejected_logps: [B], the same for the rejected answers.
        nll_loss: scalar NLL of the chosen sequences.
        beta: the paper's lambda, >= 0.
        odds_temperature: multiplies the log odds inside the sigmoid, > 0.

    Returns:
        `ORPOOutput`, in fp32 (fp64 where the inputs are fp64).

    Raises:
        BatchError: shapes differ, there is no pair, or `nll_loss` is not a scalar.
        ConfigError: `beta` or `odds_temperature` out of range.

    Source: equations 6 and 7 of the paper; `odds_temperature=1` there.
    """
    if chosen_logps.shape != rejected_logps.shape or chosen_logps.ndim != 1 or not chosen_logps.numel():
        raise BatchError(
            f"chosen_logps has shape {tuple(chosen_logps.shape)} and rejected_logps {tuple(rejected_logps.shape)}: "
            "both must be [B] with at least one pair"
        )
    if nll_loss.numel() != 1:
        raise BatchError(f"nll_loss has shape {tuple(nll_loss.shape)}: reduce it to a scalar first")
    check_coefficients(beta, odds_temperature)
    chosen_logps, rejected_logps = at_least_fp32(chosen_logps), at_least_fp32(rejected_logps)
    odds = log_odds(chosen_logps, rejected_logps)
    ratio = F.logsigmoid(odds_temperature * odds)
    return ORPOOutput(
        loss=loss_of_means(nll_loss.reshape(()), ratio.mean(), beta),
        nll_loss=nll_loss.reshape(()),
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        log_odds_chosen=odds,
        log_odds_ratio=ratio,
    )


def output_of(
    *,
    loss: Tensor,
    nll_loss: Tensor,
    logps: Tensor,
    odds_temperature: float,
    margins: Tensor | float = 0.0,
    metrics: dict[str, Tensor],
) -> ORPOOutput:
    """The output with a loss and the mean log-probabilities [2B] that it comes from, chosen answers first."""
    chosen, rejected = logps.view(2, -1)
    odds = log_odds(chosen, rejected)
    return ORPOOutput(
        loss=loss,
        nll_loss=nll_loss,
        chosen_logps=chosen,
        rejected_logps=rejected,
        log_odds_chosen=odds,
        log_odds_ratio=F.logsigmoid(odds_temperature * odds - margins),
        metrics=metrics,
    )


def at_least_fp32(x: Tensor) -> Tensor:
    """Raises 16-bit values to fp32, where 1 - p keeps its digits; fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def check_coefficients(beta: float, odds_temperature: float) -> None:
    """Raises `ConfigError` for a coefficient that would reverse or remove the preference."""
    if not isinstance(beta, int | float) or not 0 <= beta < float("inf"):
        raise ConfigError(f"beta is {beta!r}: it weighs the odds-ratio term and must be a finite number >= 0")
    if not isinstance(odds_temperature, int | float) or not 0 < odds_temperature < float("inf"):
        raise ConfigError(f"odds_temperature is {odds_temperature!r}: it must be a finite number > 0")
