"""The chunked head against the obvious one in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from orpo_plugins.hooks.types import HeadOptions, Objective
from orpo_plugins.kernels import chunked, hidden_gradient, tiling
from orpo_plugins.kernels.products import in_blocks, times_transposed
from orpo_plugins.kernels.reference import reference_head
from orpo_plugins.kernels.tile_steps import TorchSteps
from orpo_plugins.targets import Targets
from tests.kit.compare import assert_all_within, assert_within, relative_difference
from tests.kit.kernel_cases import Case, make_case, run_case

FP32 = 2e-6
"""Some tens of fp32's rounding unit: what a sum over a few hundred products may lose."""

RAGGED = {
    "one pair, one token": {"pairs": 1, "length": 1, "width": 1, "vocabulary": 2},
    "answers of one token": {"pairs": 3, "length": 5, "ignored": 1.0},
    "odd everything": {"pairs": 3, "length": 7, "width": 33, "vocabulary": 513},
    "vocabulary of one tile and one": {"pairs": 1, "length": 4, "vocabulary": 513},
    "more targets than a tile": {"pairs": 2, "length": 259, "width": 5, "vocabulary": 67, "ignored": 0.0},
    "prompts in the NLL alone": {"pairs": 2, "length": 12, "prompt": 6},
    "large logits": {"pairs": 2, "length": 6, "scale": 12.0, "vocabulary": 700},
    "bias": {"pairs": 2, "length": 8, "bias": True, "vocabulary": 600},
}
TRANSFORMS = {
    "plain": {},
    "soft-cap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.125},
    "soft-cap and scale": {"softcap": 3.0, "logit_scale": 2.0},
}


def in_float64(case, **options):
    """(output, gradients) of the reference on the same inputs in float64."""
    return run_case(case.to(torch.float64), kernel="reference", **options)


def assert_same(actual, expected, tolerance):
    """Loss, figures and gradients."""
    for name in ("loss", "nll_loss", "chosen_logps", "rejected_logps"):
        assert_within(getattr(actual[0], name), getattr(expected[0], name), tolerance, name)
    assert_all_within(actual[1], expected[1], tolerance)


@pytest.fixture(params=[(512, 512, 4096, 512), (5, 64, 7, 24)], ids=["one tile", "many tiles"])
def tile_sizes(request, monkeypatch):
    """Tile sizes: those in use, and some that cut even the smallest case."""
    targets, columns, grad_targets, grad_columns = request.param
    plan = tiling.Tiling.plan

    def cut(count, weight, options, **named):
        kept = plan(count, weight, options, **named).kept
        tiles = min(kept, math.ceil(len(weight) / columns))
        sizes = {"targets": targets, "columns": columns, "grad_targets": grad_targets, "grad_columns": grad_columns}
        return tiling.Tiling(**sizes, kept=tiles)

    monkeypatch.setattr(tiling.Tiling, "plan", cut)
    return request.param


@pytest.mark.parametrize("budget", [0, 2**26], ids=["tiles computed again", "tiles kept"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", RAGGED.values(), ids=RAGGED)
def test_equals_the_reference_in_fp32(shape, transform, budget, tile_sizes):
    case = make_case(**shape)
    actual = run_case(case, kernel="chunked", memory_budget=budget, **transform)
    # Products of "large logits" round at the size of the logits, 200, and exponentials turn that into a relative error.
    tolerance = FP32 * (40 if shape.get("scale", 1.0) > 1 else 4)
    assert_same(actual, in_float64(case, **transform), tolerance)


class AlignedSteps(TorchSteps):
    """As on a GPU: rows of tiles begin at multiples of 16, and the number of targets is a multiple of 16."""

    alignment = 16

    def scan(self, tile, running, out):
        self.check(tile.products)
        if out is not None:
            self.check(out)
        return super().scan(tile, running, out)

    def gradient(self, tile, running_max, target_entry, coefficients, out):
        self.check(tile.products)
        self.check(out)
        super().gradient(tile, running_max, target_entry, coefficients, out)

    @staticmethod
    def check(rows):
        assert rows.stride(1) == 1
        assert rows.stride(0) % 16 == rows.storage_offset() % 16 == 0


@pytest.mark.parametrize("budget", [0, 2**26], ids=["tiles computed again", "tiles kept"])
@pytest.mark.parametrize("order", ["in place", "beside"])
@pytest.mark.parametrize("shape", RAGGED.values(), ids=RAGGED)
def test_tiles_with_aligned_rows_give_the_same(monkeypatch, shape, order, budget):
    monkeypatch.setitem(chunked.chunked_head.keywords, "steps", AlignedSteps)
    monkeypatch.setattr(hidden_gradient, "_SPARE_ON_CPU", 0 if order == "in place" else 2**24)
    sizes = {"targets": 32, "columns": 64, "grad_targets": 48, "grad_columns": 24}
    planned = tiling.Tiling.plan
    counts = []

    def cut(count, weight, options, **named):
        counts.append(count)
        kept = planned(count, weight, options, **named).kept
        return tiling.Tiling(**sizes, kept=min(kept, math.ceil(len(weight) / 64)))

    monkeypatch.setattr(tiling.Tiling, "plan", cut)
    case = make_case(**shape)
    tolerance = FP32 * (40 if shape.get("scale", 1.0) > 1 else 4)
    assert_same(run_case(case, kernel="chunked", memory_budget=budget), in_float64(case), tolerance)
    assert counts[0] % 16 == 0


@pytest.mark.parametrize("layout", ["as they lie", "left with gaps", "right with gaps", "transposed"])
def test_long_sums_in_fp32_are_within_some_roundings_of_float64(layout):
    torch.manual_seed(0)
    left, right = torch.randn(37, 8192), torch.randn(29, 8192)
    exact = left.double() @ right.double().T
    if layout == "left with gaps":
        left = torch.cat([left, left], 1)[:, :8192]
    elif layout == "right with gaps":
        right = torch.cat([right, right], 1)[:, :8192]
    elif layout == "transposed":
        left, right = left.T.contiguous().T, right.T.contiguous().T
    # Adding 8,192 terms one after another is off by 1.6e-6, in blocks by the root of their number less.
    assert_within(times_transposed(left, in_blocks(right)), exact, 5e-7)


def test_a_small_budget_takes_smaller_tiles_and_a_large_one_keeps_them():
    weight = torch.empty(4096, 64)
    plans = {
        budget: tiling.Tiling.plan(1500, weight, HeadOptions(memory_budget=budget), trainable=True)
        for budget in (0, 2**20, None, 2**30)
    }
    sizes = [plan.targets * plan.columns for plan in plans.values()]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
    assert [plan.kept for plan in plans.values()] == [0, 0, 0, math.ceil(4096 / plans[2**30].columns)]


@pytest.mark.parametrize("count", [1, 31, 256, 257, 769, 1500])
def test_tiles_are_of_about_one_size(count):
    targets = tiling.Tiling.plan(count, torch.empty(99, 8), HeadOptions(), trainable=False).targets
    assert targets * (math.ceil(count / targets) - 1) < count <= targets * math.ceil(count / targets)
    assert targets <= 256
    assert math.ceil(count / targets) == math.ceil(count / 256)


@pytest.mark.parametrize("budget", [0, 2**26], ids=["tiles computed again", "tiles kept"])
def test_equals_the_reference_in_float64_to_its_last_digits(budget, tile_sizes):
    case = make_case(bias=True, vocabulary=600, prompt=3, dtype=torch.float64)
    actual = run_case(case, kernel="chunked", memory_budget=budget, softcap=7.0, logit_scale=0.5)
    assert_same(actual, in_float64(case, softcap=7.0, logit_scale=0.5), 1e-13)


@pytest.mark.parametrize("budget", [0, 2**26], ids=["tiles computed again", "tiles kept"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_16_bit_errors_are_no_larger_than_those_of_the_reference_in_the_same_dtype(dtype, transform, budget):
    case = make_case(pairs=3, length=40, width=64, vocabulary=1031, bias=True, prompt=10, dtype=dtype, scale=0.5)
    expected = in_float64(case, **transform)
    actual = run_case(case, kernel="chunked", memory_budget=budget, **transform)
    peer = run_case(case, kernel="reference", **transform)
    assert relative_difference(actual[0].chosen_logps, expected[0].chosen_logps) <= relative_difference(
        peer[0].chosen_logps, expected[0].chosen_logps
    )
    for name, gradient in actual[1].items():
        assert gradient.dtype == dtype
        ours = relative_difference(gradient, expected[1][name])
        theirs = relative_difference(peer[1][name], expected[1][name])
        # A kept tile is rounded before its targets' coefficients are known, which are then rounded as well.
        allowed = 1.3 if budget and name == "weight" else 1.05
        assert ours <= allowed * theirs, f"{name}: {ours:.2e} against {theirs:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_chunked_fp32_gives_the_gradients_of_float64_rounded_once_to_16_bits(dtype, transform):
    case = make_case(pairs=3, length=60, width=64, vocabulary=1031, bias=True, prompt=10, dtype=dtype, scale=0.5)
    expected, gradients = in_float64(case, **transform)
    actual = run_case(case, kernel="chunked_fp32", **transform)
    assert_within(actual[0].chosen_logps, expected.chosen_logps, FP32)
    for name, gradient in actual[1].items():
        assert gradient.dtype == dtype
        rounded = relative_difference(gradients[name].to(dtype), gradients[name])
        assert relative_difference(gradient, gradients[name]) <= 1.01 * rounded, name


@pytest.mark.parametrize("budget", [0, 2**26], ids=["tiles computed again", "tiles kept"])
@pytest.mark.parametrize("transform", [{}, {"softcap": 400.0}], ids=["plain", "soft-cap"])
def test_bf16_probabilities_keep_their_digits_where_all_logits_are_large(transform, budget):
    torch.manual_seed(0)
    case = make_case(pairs=2, length=24, width=65, vocabulary=700, scale=0.3)
    case.hidden[..., -1], case.weight[:, -1] = 16.0, 16.0  # raises all logits by 256, where bf16 has steps of 1 or 2
    case = case.to(torch.bfloat16)
    _, actual = run_case(case, kernel="chunked", memory_budget=budget, **transform)
    _, expected = in_float64(case, **transform)
    assert_all_within(actual, expected, 6e-3)  # three roundings to bf16, of 1.7e-3 each, and that of the differences


@pytest.mark.parametrize("budget", [0, None], ids=["tiles computed again", "some tiles kept"])
def test_bf16_gradients_are_as_exact_where_a_wrong_token_is_certain(budget):
    """A tile that is computed again is rounded as the sum was that divides it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 96, generator=generator) / 96**0.5
    labels = torch.randint(3000, (4, 150), generator=generator)
    wrong = torch.randint(3000, (4, 150), generator=generator)
    hidden = 2 * torch.randn(4, 150, 96, generator=generator) + 20 * weight[wrong]
    case = Case(hidden=hidden, weight=weight, labels=labels).to(torch.bfloat16)
    _, actual = run_case(case, kernel="chunked", memory_budget=budget)
    _, expected = in_float64(case)
    assert_all_within(actual, expected, 3.5e-3)  # two roundings to bf16, and rounded logits that hardly count


def test_few_targets_take_no_wide_tiles():
    for count in (1, 2, 100):
        plan = tiling.Tiling.plan(count, torch.empty(10**6, 4), HeadOptions(), trainable=True)
        assert plan.grad_columns <= plan.columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0, None, 2**26])
def test_no_target_at_all_gives_gradients_of_zero(dtype, budget):
    nothing = torch.zeros(0, dtype=torch.int64)
    targets = Targets(
        positions=nothing,
        token_ids=nothing,
        sequence_ids=nothing,
        in_answer=nothing.bool(),
        in_nll=nothing.bool(),
        num_pairs=1,
    )
    objective = Objective(nll_weights=torch.zeros(0), pair_loss=lambda given: (given.chosen - given.rejected).sum())
    hidden, weight = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((3, 8), (50, 8)))
    result = chunked.chunked_head(hidden, weight, None, targets, objective, HeadOptions(memory_budget=budget))
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("budget", [0, 2**26], ids=["in place", "beside"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_rows_may_be_read_in_any_order_and_twice(dtype, budget, tile_sizes):
    torch.manual_seed(0)
    rows = torch.randperm(40)[:30]
    rows = torch.cat([rows, rows[3:11]])
    count, pairs = len(rows), 2
    sequences = torch.arange(count) * 2 * pairs // count
    hidden, weight = torch.randn(40, 16, dtype=dtype) * 0.5, torch.randn(301, 16, dtype=dtype)
    hidden[sorted(set(range(40)) - set(rows.tolist()))] = math.nan
    targets = Targets(
        positions=rows,
        token_ids=torch.randint(301, (count,)),
        sequence_ids=sequences,
        in_answer=torch.rand(count) < 0.8,
        in_nll=sequences < pairs,
        num_pairs=pairs,
    )
    objective = Objective(
        nll_weights=targets.in_nll / targets.in_nll.sum(),
        pair_loss=lambda given: -F.logsigmoid(given.chosen - given.rejected).mean(),
    )
    options = HeadOptions(memory_budget=budget, logit_means=True)

    def run(kernel, dtype):
        leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in (hidden, weight)]
        result = kernel(*leaves, None, targets, objective, options)
        result.loss.backward()
        return {"hidden": leaves[0].grad, "weight": leaves[1].grad, "means": result.logit_means, "logps": result.logps}

    actual, expected = run(chunked.chunked_head, dtype), run(reference_head, torch.float64)
    assert_all_within(actual, expected, {torch.float64: 1e-13, torch.float32: FP32, torch.bfloat16: 8e-3}[dtype])


@pytest.mark.parametrize("upstream", [1.0, 65536.0, 1e-4])
def test_fp16_gradients_survive_loss_scales_and_long_batches(upstream):
    case = make_case(pairs=2, length=200, width=8, vocabulary=301, dtype=torch.float16, scale=0.05)
    _, gradients = run_case(case, kernel="chunked", upstream=upstream, beta=1e-3)
    _, expected = in_float64(case, upstream=upstream, beta=1e-3)
    for name in gradients:
        rounded = expected[name].to(torch.float16)  # what fp16 can hold of it at all
        floor = relative_difference(rounded, expected[name])
        assert_within(gradients[name], expected[name], 2e-3 + 2 * floor, name)


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_only_what_requires_a_gradient_gets_one(needs):
    case = make_case(bias=True)
    output, gradients = run_case(case, kernel="chunked", needs=needs)
    assert set(gradients) == set(needs)
    expected = in_float64(case)
    assert_within(output.loss, expected[0].loss, FP32)
    assert_all_within(gradients, {name: expected[1][name] for name in needs}, FP32)


def test_a_weight_may_lie_transposed_in_memory():
    case = make_case(vocabulary=600)
    case.weight.set_(case.weight.T.contiguous().T)
    assert not case.weight.is_contiguous()
    assert_same(run_case(case, kernel="chunked"), in_float64(case), 4 * FP32)


def test_no_gradient_is_computed_under_no_grad():
    case = make_case()
    with torch.no_grad():
        output, gradients = run_case(case, kernel="chunked")
    assert not gradients
    assert not output.loss.requires_grad
    assert_within(output.loss, in_float64(case)[0].loss, FP32)


def test_a_second_backward_is_refused():
    output, _ = run_case(make_case(), kernel="chunked")
    with pytest.raises(RuntimeError, match="backward\\(\\) was called twice on one loss"):
        output.loss.backward()


def test_the_figures_carry_no_gradient():
    output, _ = run_case(make_case(), kernel="chunked")
    assert not output.nll_loss.requires_grad
    assert not output.chosen_logps.requires_grad


def test_a_tied_embedding_gets_the_gradient_of_both_uses():
    case = make_case(vocabulary=40)
    total = []
    for kernel in ("reference", "chunked"):
        embedding = case.weight.clone().double().requires_grad_()
        hidden = torch.tanh(F.embedding(case.labels.clamp(min=0), embedding))
        output, _ = run_case_with(hidden, embedding, case, kernel)
        output.loss.backward()
        total.append(embedding.grad)
    assert_within(total[1], total[0], 1e-12)


def run_case_with(hidden, weight, case, kernel):
    """`linear_orpo_loss` on tensors that are no leaves."""
    from orpo_plugins import linear_orpo_loss

    return linear_orpo_loss(hidden, weight, case.labels, kernel=kernel), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_parameters(dtype):
    case = make_case(bias=True, vocabulary=300)
    with torch.autocast("cpu", dtype=dtype):
        output, gradients = run_case(case, kernel="chunked")
    expected, rounded = run_case(case.to(dtype), kernel="chunked")
    assert_within(output.loss, expected.loss, 0.0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert_all_within(gradients, {name: gradient.float() for name, gradient in rounded.items()}, 0.0)


@pytest.mark.parametrize("budget", [0, 2**26])
def test_two_runs_give_the_same_bits(budget):
    case = make_case(pairs=3, length=50, vocabulary=1500, dtype=torch.bfloat16)
    first, second = (run_case(case, kernel="chunked", memory_budget=budget) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_row_does_not_change_another_ones_result():
    case = make_case(pairs=4, length=20, vocabulary=600, ignored=0.0)
    alone = run_case(case, kernel="chunked")[0]
    case.hidden[1] *= 30
    case.labels[5, 3:] = -100
    disturbed = run_case(case, kernel="chunked")[0]
    assert_within(disturbed.chosen_logps[[0, 2, 3]], alone.chosen_logps[[0, 2, 3]], 1e-6)
    assert_within(disturbed.rejected_logps[[0, 2, 3]], alone.rejected_logps[[0, 2, 3]], 1e-6)


def test_logit_means_are_those_of_the_final_logits():
    case = make_case(bias=True, vocabulary=600, ignored=0.0)
    targets = Targets.from_labels(case.labels, None, -100)
    rows = case.hidden.flatten(0, 1)[targets.positions]
    objective = Objective(nll_weights=targets.in_nll.float(), pair_loss=lambda pairs: pairs.chosen.sum())
    options = HeadOptions(softcap=4.0, logit_scale=0.5, logit_means=True)
    arguments = (rows, case.weight, case.bias, targets, objective, options)
    assert_within(chunked.chunked_head(*arguments).logit_means, reference_head(*arguments).logit_means, 1e-6)
    assert chunked.chunked_head(*arguments[:-1], HeadOptions()).logit_means is None


def confident(margin):
    """One pair whose target logits lie `margin` above all others, which are 0."""
    case = make_case(pairs=1, length=3, width=4, vocabulary=50, ignored=0.0)
    case.hidden.zero_()
    case.weight.zero_()
    case.hidden[..., 0] = margin
    case.weight[7, 0] = 1.0
    case.labels.fill_(7)
    return case


@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0])
def test_log_probabilities_near_zero_keep_their_digits(margin):
    output, gradients = run_case(confident(margin), kernel="chunked")
    expected = -math.log1p(49 * math.exp(-margin))
    assert_within(output.chosen_logps[0], torch.tensor(expected, dtype=torch.float64), 1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("margin", [-50.0, -200.0, -3000.0])
def test_targets_far_below_the_maximum_are_exact(margin, tile_sizes):
    case = confident(0.0)
    case.weight[8, 0] = -margin
    case.hidden[..., 0] = 1.0
    actual = run_case(case, kernel="chunked")
    assert_same(actual, in_float64(case), FP32)


def test_bf16_stays_finite_where_a_targets_own_product_is_rounded_far_above_its_logit():
    # 100,000 in bf16 has steps of 512: the running maximum comes from a product that is 2^40 and more times too large.
    torch.manual_seed(0)
    case = make_case(pairs=1, length=3, width=64, vocabulary=50, ignored=0.0, bias=True)
    case.hidden.uniform_(1.0, 2.0)
    case.weight.mul_(0.01)[7].uniform_(1040.0, 1350.0)
    case.labels.fill_(7)
    output, gradients = run_case(case.to(torch.bfloat16), kernel="chunked")
    assert output.chosen_logps.tolist() == output.rejected_logps.tolist() == [0.0]
    assert_within(output.loss, torch.tensor(0.1 * math.log(2)), 1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def simpo(pairs):
    """Meng et al. 2024, equation 6, with beta 2 and margin 0.5."""
    return -F.logsigmoid(2.0 * (pairs.chosen - pairs.rejected) - 0.5)


def cpo(pairs):
    """Xu et al. 2024, equation 5, with beta 0.1, on summed log-probabilities."""
    chosen, rejected = pairs.chosen * pairs.chosen_lengths, pairs.rejected * pairs.rejected_lengths
    return -F.logsigmoid(0.1 * (chosen - rejected))


@pytest.mark.parametrize("pair_loss", [simpo, cpo])
def test_any_differentiable_pair_loss_runs_through_the_kernel(pair_loss):
    case = make_case(pairs=3, length=11, vocabulary=600, prompt=4)
    actual = run_case(case, kernel="chunked", pair_loss=pair_loss)
    assert_same(actual, in_float64(case, pair_loss=pair_loss), FP32)
    logps = torch.stack([actual[0].chosen_logps, actual[0].rejected_logps])
    assert_within(actual[0].loss, actual[0].nll_loss + expected_pair_term(pair_loss, case, logps), FP32)


def expected_pair_term(pair_loss, case, logps):
    from orpo_plugins.objective import PairLogps

    lengths = (case.labels != -100).sum(1).view(2, -1)
    pairs = PairLogps(chosen=logps[0], rejected=logps[1], chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    return pair_loss(pairs).mean()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pairs=st.integers(1, 4),
    length=st.integers(1, 9),
    width=st.integers(1, 19),
    vocabulary=st.integers(2, 700),
    ignored=st.floats(0.0, 1.0),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    logit_scale=st.sampled_from([1.0, 0.0625, 3.0]),
    scale=st.sampled_from([0.0, 1e-3, 1.0]),
    budget=st.sampled_from([None, 0, 2**22]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference_on_any_shape(softcap, logit_scale, budget, **shape):
    case = make_case(**shape)
    transform = {"softcap": softcap, "logit_scale": logit_scale}
    actual = run_case(case, kernel="chunked", memory_budget=budget, **transform)
    expected = in_float64(case, **transform)
    # Above, the objective holds log-probabilities at the dtype's guard, which is nearer to 0 in float64.
    assume(max(expected[0].chosen_logps.max(), expected[0].rejected_logps.max()) < -torch.finfo(torch.float32).eps)
    assert_within(actual[0].loss, expected[0].loss, 4 * FP32, "loss")
    for name, gradient in actual[1].items():
        # Gradients of saturated cases cancel to nothing; what is left is compared with the size of their terms.
        size = max(expected[1][name].norm().item(), 1e-3)
        assert (gradient.double() - expected[1][name]).norm().item() <= 20 * FP32 * size, name
