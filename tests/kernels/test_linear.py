"""`linear_orpo_loss`: what it returns, its denominators, and its errors."""

import re
from dataclasses import replace

import pytest
import torch

from orpo_plugins import linear_orpo_loss, orpo_loss
from orpo_plugins.errors import BatchError, ConfigError
from tests.kit.compare import assert_within
from tests.kit.kernel_cases import make_case, run_case


def naive(case, *, beta=0.1, odds_temperature=1.0):
    """The docstring's expression, row by row in float64."""
    logps = (case.hidden.double() @ case.weight.double().T).log_softmax(-1)
    pairs = len(case.labels) // 2
    nll_labels = case.labels[:pairs] if case.nll_labels is None else case.nll_labels

    def picked(row, labels):
        inside = labels != -100
        return logps[row][inside].gather(-1, labels[inside][:, None])[:, 0]

    means = torch.stack([picked(row, labels).mean() for row, labels in enumerate(case.labels)])
    nll = -torch.cat([picked(row, labels) for row, labels in enumerate(nll_labels)]).mean()
    return orpo_loss(means[:pairs], means[pairs:], nll, beta=beta, odds_temperature=odds_temperature)


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("kernel", ["auto", "reference", "chunked"])
def test_returns_the_objective_and_its_figures(kernel, prompt):
    case = make_case(pairs=3, prompt=prompt)
    output, _ = run_case(case, kernel=kernel, beta=0.3, odds_temperature=2.0)
    expected = naive(case, beta=0.3, odds_temperature=2.0)
    for name in ("loss", "nll_loss", "chosen_logps", "rejected_logps", "log_odds_chosen", "log_odds_ratio"):
        assert_within(getattr(output, name), getattr(expected, name), 1e-5, name)
    lengths = (case.labels != -100).sum(1)
    assert torch.equal(output.metrics["chosen_lengths"], lengths[:3].float())
    assert torch.equal(output.metrics["rejected_lengths"], lengths[3:].float())


def test_micro_batches_with_the_denominators_of_the_whole_step_add_up_to_it():
    case = make_case(pairs=4, length=12, prompt=4, dtype=torch.float64)
    whole, gradients = run_case(case)
    tokens = whole.metrics["nll_tokens"]
    loss, weight_gradient = 0.0, 0.0
    for first in range(0, 4, 2):
        rows = [first, first + 1, first + 4, first + 5]
        part = replace(
            case, hidden=case.hidden[rows], labels=case.labels[rows], nll_labels=case.nll_labels[first : first + 2]
        )
        output, found = run_case(part, nll_tokens=tokens, num_pairs=4)
        loss, weight_gradient = loss + output.loss, weight_gradient + found["weight"]
    assert_within(loss, whole.loss, 1e-12)
    assert_within(weight_gradient, gradients["weight"], 1e-12)


def test_without_a_label_in_the_nll_the_odds_ratio_alone_remains():
    case = make_case()
    empty = replace(case, nll_labels=torch.full_like(case.labels[:2], -100))
    output, gradients = run_case(empty)
    assert float(output.nll_loss) == 0.0
    assert_within(output.loss, -0.1 * output.log_odds_ratio.mean(), 1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_an_ignore_index_of_ones_own():
    case = make_case()
    other = replace(case, labels=torch.where(case.labels == -100, 7_000_000, case.labels))
    assert torch.equal(run_case(other, ignore_index=7_000_000)[0].loss, run_case(case)[0].loss)


def test_hidden_states_where_nothing_is_predicted_are_not_looked_at():
    case = make_case()
    expected, gradients = run_case(case)
    case.hidden[case.labels == -100] = float("nan")
    output, found = run_case(case)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(found["hidden"], gradients["hidden"])


def changed(**changes):
    """A good case with something in its place; a function sees the good tensor first."""
    case = make_case(pairs=2, length=5, width=4, vocabulary=11, ignored=0.0)
    return replace(case, **{name: value(getattr(case, name)) for name, value in changes.items()})


def with_value(row, position, value):
    """Puts one value into a copy."""

    def put(tensor):
        tensor = tensor.clone()
        tensor[row, position] = value
        return tensor

    return put


BAD = {
    "odd number of rows": (
        changed(hidden=lambda x: x[:3], labels=lambda x: x[:3]),
        "hidden has 3 rows, an odd number: expected B chosen rows and then B rejected ones",
    ),
    "no row": (changed(hidden=lambda x: x[:0], labels=lambda x: x[:0]), "hidden has shape (0, 5, 4)"),
    "flat hidden states": (changed(hidden=lambda x: x.flatten(0, 1)), "hidden has shape (20, 4): expected [2B, T, H]"),
    "labels of another length": (
        changed(labels=lambda x: x[:, :-1]),
        "labels has shape (4, 4), expected (4, 5) for hidden of shape (4, 5, 4)",
    ),
    "NLL labels for all rows": (
        changed(nll_labels=lambda _: torch.zeros(4, 5, dtype=torch.long)),
        "nll_labels has shape (4, 5), expected (2, 5)",
    ),
    "a transposed weight": (changed(weight=lambda x: x.T), "weight has shape (4, 11), expected (4, 4)"),
    "a weight without dimensions": (changed(weight=lambda x: x[0, 0]), "weight has shape (), expected (0, 4)"),
    "a bias of another size": (changed(bias=lambda _: torch.zeros(10)), "bias has shape (10,), expected (11,)"),
    "float labels": (
        changed(labels=lambda x: x.float()),
        "labels has dtype torch.float32: token ids must be torch.int64",
    ),
    "mixed dtypes": (
        changed(weight=lambda x: x.bfloat16()),
        "hidden is torch.float32 but weight is torch.bfloat16: cast them to one dtype",
    ),
    "another device": (changed(weight=lambda x: x.to("meta")), "weight is on meta but hidden is on cpu"),
    "a label too large": (
        changed(labels=with_value(3, 2, 11)),
        "the label at [3, 2] is 11, outside 0..10: mark positions without a label with ignore_index",
    ),
    "a negative label": (changed(labels=with_value(0, 4, -1)), "the label at [0, 4] is -1, outside 0..10"),
    "an empty answer": (
        changed(labels=with_value(2, slice(None), -100)),
        "row 2 (rejected answer of pair 0) has no label: its mean log-probability is undefined. Drop the pair",
    ),
    "NaN": (changed(hidden=with_value(1, 3, float("nan"))), "hidden[1, 3] contains NaN or infinity"),
    "infinity": (changed(hidden=with_value(2, 0, float("inf"))), "hidden[2, 0] contains NaN or infinity"),
    "NLL labels that contradict labels": (
        changed(labels=with_value(1, 2, 5), nll_labels=lambda _: torch.full((2, 5), 6)),
        "one position predicts one token",
    ),
}


def test_infinity_is_named_where_a_soft_cap_would_hide_it():
    case, message = BAD["infinity"]
    with pytest.raises(BatchError, match=re.escape(message)):
        linear_orpo_loss(case.hidden, case.weight, case.labels, softcap=30.0)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_batch_is_named(name):
    case, message = BAD[name]
    with pytest.raises(BatchError) as error:
        linear_orpo_loss(case.hidden, case.weight, case.labels, nll_labels=case.nll_labels, bias=case.bias)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "fast"}, "unknown kernel 'fast'; known: auto, chunked, chunked_fp32, reference, triton"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"odds_temperature": 0.0}, "odds_temperature is 0.0"),
        ({"softcap": 0.0}, "softcap is 0.0: it must be a finite number > 0, or None for no soft-cap"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0: it must be a finite number > 0"),
        ({"memory_budget": -1}, "memory_budget is -1: it is a number of bytes, or None"),
        ({"nll_tokens": 0}, "nll_tokens is 0: the loss is divided by it. Give a number > 0, or None"),
        ({"num_pairs": -2.0}, "num_pairs is -2.0: the loss is divided by it"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ConfigError) as error:
        run_case(make_case(), **options)
    assert message in str(error.value)


def test_a_pair_loss_that_is_no_number_per_pair_is_named():
    with pytest.raises(BatchError, match=r"pair_loss returned shape \(\) for 2 pairs: return one number per pair"):
        run_case(make_case(), pair_loss=lambda pairs: pairs.chosen.sum())
