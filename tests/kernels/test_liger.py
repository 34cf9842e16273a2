"""`FusedLinearORPOLoss` against liger-kernel's `LigerFusedLinearORPOLoss`."""

import inspect
import re

import pytest
import torch

from orpo_plugins import FusedLinearORPOLoss
from orpo_plugins.errors import BatchError
from tests.kit.compare import assert_within

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is an optional peer")

FIGURES = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
    "nll_loss",
    "chosen_rewards",
    "rejected_rewards",
    "log_odds_ratio",
    "log_odds_chosen",
)


def batch(rows, length, width, vocabulary, *, scale=1.0, dtype=torch.float32, bias=False, ignored=0.0, seed=0):
    """weight, hidden, target, bias as both classes take them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, length, width, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (rows, length), generator=generator)
    target[torch.rand(rows, length, generator=generator) < ignored] = -100
    target[:, 0] = 1
    offset = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_() if bias else None
    return weight, hidden, target, offset


def run(cls, arguments, nll_target=None, upstream=1.0, **options):
    """(loss, figures, gradients) of a fresh module on fresh leaves."""
    weight, hidden, target, bias = arguments
    leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in (weight, hidden, bias)]
    if cls is liger.LigerFusedLinearORPOLoss:
        options["compiled"] = False
    loss, metrics = cls(**options)(leaves[0], leaves[1], target, leaves[2], nll_target=nll_target)
    (loss * upstream).backward()
    return loss, metrics, [leaf.grad for leaf in leaves if leaf is not None]


def assert_equal_to_liger(arguments, tolerance, nll_target=None, upstream=1.0, **options):
    ours = run(FusedLinearORPOLoss, arguments, nll_target, upstream, **options)
    theirs = run(liger.LigerFusedLinearORPOLoss, arguments, nll_target, upstream, **options)
    assert_within(ours[0], theirs[0], tolerance, "loss")
    assert len(ours[1]) == len(theirs[1]) == len(FIGURES)
    for name, actual, expected in zip(FIGURES, ours[1], theirs[1], strict=True):
        assert_within(actual.float(), expected.float(), tolerance, name)
    for name, actual, expected in zip(("weight", "hidden", "bias"), ours[2], theirs[2], strict=False):
        assert actual.dtype == expected.dtype
        assert_within(actual, expected, tolerance, f"gradient of {name}")


def test_constructor_and_call_have_ligers_signature():
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(FusedLinearORPOLoss, method)).parameters.values()
        theirs = inspect.signature(getattr(liger.LigerFusedLinearORPOLoss, method)).parameters.values()
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("ignore_index", "beta"), [(-100, 0.1), (42, 0.2)])
@pytest.mark.parametrize("shape", [(8, 64, 16, 81), (6, 11, 7, 129), (2, 3, 5, 4097)])
def test_equals_liger_in_fp32(shape, ignore_index, beta, bias):
    arguments = batch(*shape, bias=bias)
    arguments[2][:, 1] = ignore_index
    assert_equal_to_liger(arguments, 2e-5, ignore_index=ignore_index, beta=beta)


@pytest.mark.parametrize("shape", [(8, 32, 16, 81), (6, 11, 7, 129)])
def test_equals_liger_in_bf16_up_to_its_rounding(shape):
    assert_equal_to_liger(batch(*shape, dtype=torch.bfloat16, bias=True), 3e-2)


def test_equals_liger_with_its_own_nll_targets():
    arguments = batch(6, 11, 7, 129, ignored=0.4)
    nll_target = batch(6, 11, 7, 129, ignored=0.2, seed=1)[2]
    assert_equal_to_liger(arguments, 1e-5, nll_target=nll_target)


def test_equals_liger_without_the_nll():
    assert_equal_to_liger(batch(4, 11, 7, 129), 1e-5, compute_nll_loss=False)


def test_equals_liger_under_an_upstream_gradient():
    assert_equal_to_liger(batch(4, 11, 7, 129, bias=True), 1e-5, upstream=3.0)


def test_an_answer_without_a_token_is_an_error_where_liger_gives_nan():
    weight, hidden, target, _ = batch(4, 5, 7, 31)
    target[3] = -100
    with pytest.raises(BatchError, match=r"row 3 \(rejected answer of pair 1\) has no label"):
        FusedLinearORPOLoss()(weight, hidden, target)


def test_weight_and_input_in_the_wrong_order_are_an_error():
    weight, hidden, target, _ = batch(4, 5, 7, 31)
    with pytest.raises(BatchError, match="expected \\[2B, T, H\\]"):
        FusedLinearORPOLoss()(hidden, weight, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_input": torch.zeros(0, 5, 7), "target": torch.zeros(0, 5, dtype=torch.int64)},
            "_input has shape (0, 5, 7)",
        ),
        ({"lin_weight": torch.zeros(31, 6)}, "lin_weight has shape (31, 6), expected (31, 7)"),
        ({"bias": torch.zeros(30)}, "bias has shape (30,), expected (31,)"),
        (
            {"target": torch.zeros(4, 5, dtype=torch.int32)},
            "target has dtype torch.int32: token ids must be torch.int64",
        ),
        ({"nll_target": torch.zeros(1, 5, dtype=torch.int64)}, "nll_target has shape (1, 5), expected (2, 5)"),
    ],
)
def test_what_does_not_fit_together_is_named_as_liger_names_it(changes, message):
    weight, hidden, target, _ = batch(4, 5, 7, 31)
    with pytest.raises(BatchError, match=re.escape(message)):
        FusedLinearORPOLoss()(**{"lin_weight": weight, "_input": hidden, "target": target} | changes)
