"""The objective: equal to its float64 definition, finite with finite gradients for every input."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_plugins import errors, orpo_loss
from orpo_plugins.objective import log1mexp, log_odds

LOGPS = st.floats(min_value=-1e4, max_value=0.0, allow_nan=False)


def by_definition(chosen: float, rejected: float, nll: float, beta: float, temperature: float) -> float:
    """The formula in 200 digits, where nothing cancels."""
    with mpmath.workdps(200):
        odds = [mpmath.log(p / (1 - p)) for p in (mpmath.exp(mpmath.mpf(chosen)), mpmath.exp(mpmath.mpf(rejected)))]
        return float(nll + beta * mpmath.log(1 + mpmath.exp(-temperature * (odds[0] - odds[1]))))


@given(chosen=LOGPS, rejected=LOGPS)
def test_value_and_gradient_are_finite_for_every_input(chosen: float, rejected: float) -> None:
    logps = torch.tensor([chosen, rejected], requires_grad=True)
    out = orpo_loss(logps[:1], logps[1:], torch.tensor(1.0))
    out.loss.backward()
    assert math.isfinite(out.loss.item())
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("logp", [0.0, -1e-30, -1e-10, -1e-8, -6e-8, -0.6931471805599453, -1e4])
def test_edges_are_finite(logp: float) -> None:
    x = torch.tensor([logp], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad is not None
    assert log1mexp(x).isfinite().all()
    assert x.grad.isfinite().all()


@settings(deadline=None)
@given(
    chosen=st.floats(min_value=-30, max_value=-1e-3),
    rejected=st.floats(min_value=-30, max_value=-1e-3),
    beta=st.floats(min_value=0, max_value=2),
    temperature=st.floats(min_value=0.1, max_value=4),
)
def test_float64_equals_the_definition(chosen: float, rejected: float, beta: float, temperature: float) -> None:
    out = orpo_loss(
        torch.tensor([chosen], dtype=torch.float64),
        torch.tensor([rejected], dtype=torch.float64),
        torch.tensor(2.0, dtype=torch.float64),
        beta=beta,
        odds_temperature=temperature,
    )
    # 1e-12: four roundings of a log odds of at most 37 in float64.
    assert out.loss.item() == pytest.approx(
        by_definition(chosen, rejected, 2.0, beta, temperature), rel=1e-12, abs=1e-12
    )


def test_fp32_is_within_a_few_ulps_of_float64() -> None:
    torch.manual_seed(0)
    chosen, rejected = -torch.rand(1000) * 8 - 0.01, -torch.rand(1000) * 8 - 0.01
    exact = log_odds(chosen.double(), rejected.double())
    # Four terms of at most 8, each rounded to fp32: 4 * 8 * 2**-24 = 1.9e-6.
    assert (log_odds(chosen, rejected) - exact).abs().max() < 1.9e-6


def test_the_mean_over_pairs_is_taken() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -3.0])
    whole = orpo_loss(chosen, rejected, torch.tensor(0.0)).loss
    single = [orpo_loss(chosen[i : i + 1], rejected[i : i + 1], torch.tensor(0.0)).loss for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(single).mean())


def test_half_precision_inputs_are_raised_to_fp32() -> None:
    out = orpo_loss(torch.tensor([-1.0]).bfloat16(), torch.tensor([-2.0]).half(), torch.tensor(1.0))
    assert out.log_odds_chosen.dtype == out.chosen_logps.dtype == torch.float32


def test_bad_shapes_and_coefficients_are_named() -> None:
    good, nll = torch.tensor([-1.0]), torch.tensor(1.0)
    with pytest.raises(errors.BatchError, match=r"chosen_logps has shape \(1,\) and rejected_logps \(2,\)"):
        orpo_loss(good, torch.tensor([-1.0, -2.0]), nll)
    with pytest.raises(errors.BatchError, match="at least one pair"):
        orpo_loss(good[:0], good[:0], nll)
    with pytest.raises(errors.BatchError, match=r"nll_loss has shape \(2,\)"):
        orpo_loss(good, good, torch.tensor([1.0, 2.0]))
    with pytest.raises(errors.ConfigError, match="beta is -0.1"):
        orpo_loss(good, good, nll, beta=-0.1)
    with pytest.raises(errors.ConfigError, match="odds_temperature is 0.0"):
        orpo_loss(good, good, nll, odds_temperature=0.0)
