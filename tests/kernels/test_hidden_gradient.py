"""Gradients of targets that wait for their factors in the memory that is returned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_plugins.kernels.hidden_gradient import HiddenGradient
from tests.kit.compare import assert_within


@st.composite
def positions_of_targets(draw):
    """(M, rows [N]): some rows of M, in any order, each read by at most two targets."""
    positions = draw(st.integers(1, 40))
    twice = [row for row in range(positions) for _ in range(2)]
    rows = draw(st.lists(st.sampled_from(twice), max_size=60))
    return positions, [row for index, row in enumerate(rows) if rows[:index].count(row) < 2]


def run(positions, rows, dtype, *, spare, at_once=3):
    """(gradient, what it should be in float64)."""
    width = 5
    generator = torch.Generator().manual_seed(len(rows) + positions)
    values = torch.randn(len(rows), width, generator=generator)
    factors = torch.randn(len(rows), generator=generator)
    rows = torch.tensor(rows, dtype=torch.int64)
    gradient = HiddenGradient(torch.empty(positions, width, dtype=dtype), rows, spare=spare)
    order = torch.arange(len(rows)) if gradient.order is None else gradient.order
    for band in gradient.bands(at_once):
        sums = gradient.accumulator(band)
        sums.copy_(values[order[band]])
        gradient.store(band, sums)
    expected = torch.zeros(positions, width, dtype=torch.float64)
    expected.index_add_(0, rows, values.double() * factors.double()[:, None])
    return gradient.finish(factors[order], at_once), expected


@settings(deadline=None, max_examples=60)
@given(
    case=positions_of_targets(),
    spare=st.sampled_from([0, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_each_row_gets_the_weighted_sum_of_its_targets_and_the_rest_zero(case, spare, dtype):
    gradient, expected = run(*case, dtype, spare=spare)
    assert gradient.dtype == dtype
    # bf16: the sum of two targets is rounded after each addition, and may cancel.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


def test_fp32_gradients_wait_in_the_memory_that_is_returned():
    hidden = torch.empty(8, 4)
    gradient = HiddenGradient(hidden, torch.tensor([5, 2, 7]), spare=2**20)
    waiting = gradient.accumulator(slice(0, 3))
    waiting.fill_(1.0)
    gradient.store(slice(0, 3), waiting)
    returned = gradient.finish(torch.tensor([2.0, 3.0, 4.0]), piece=2)
    assert returned.data_ptr() == waiting.data_ptr()
    assert gradient.order.tolist() == [1, 0, 2]
    assert returned[:, 0].tolist() == [0, 0, 2, 0, 0, 3, 0, 4]


@pytest.mark.parametrize(("spare", "roundings"), [(2**20, 1), (0, 2)], ids=["beside", "in place"])
def test_16_bits_are_rounded_once_beside_and_twice_in_place(spare, roundings):
    gradient, expected = run(4096, list(range(4096)), torch.bfloat16, spare=spare, at_once=512)
    # One rounding to 8 bits has a relative error of 1.65e-3 (root mean square); n of them sqrt(n) times that.
    assert_within(gradient, expected, 1.75e-3 * roundings**0.5)
