"""Batches by tokens: nothing lost, nothing over the limit, the same again on resuming, ranks in step."""

import math
import random
from itertools import chain
from typing import Any

import pytest
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_plugins.data.lengths import token_costs
from orpo_plugins.data.pairs import BuiltPair
from orpo_plugins.data.row_tokenizer import tokenized_row
from orpo_plugins.errors import ConfigError
from orpo_plugins.hooks import plugins
from orpo_plugins.layouts.batches import PairBatches
from tests.kit.laid_out import pair

LENGTHS = random.Random(0).choices(range(10, 201), k=101)
SKEWED = [2000 if index % 10 == 0 else 100 for index in range(400)]

OPTIONS = st.fixed_dictionaries(
    {
        "pairs_per_batch": st.integers(1, 5),
        "gradient_accumulation_steps": st.integers(1, 4),
        "max_tokens_per_batch": st.sampled_from([None, 100, 300]),
        "step_strategy": st.sampled_from(["pairs", "tokens"]),
        "group_by_length": st.booleans(),
        "padded": st.booleans(),
        "shuffle": st.booleans(),
        "ranks": st.integers(1, 3),
    }
)


def epochs_of_ranks(lengths: list[Any], epochs: int, **options: Any) -> list[PairBatches]:
    """Every rank's sampler, planned for so many epochs."""
    made = [PairBatches(lengths, rank=rank, **options) for rank in range(options.get("ranks", 1))]
    for sampler in made:
        sampler.plan(epochs)
    return made


def batches_of(sampler: PairBatches, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def sampler_of(lengths: list[Any], **options: Any) -> PairBatches:
    return PairBatches(lengths, **{"pairs_per_batch": 4, **options})


def test_a_pairs_tokens_are_those_its_layout_computes() -> None:
    rows = [tokenized_row(BuiltPair(pair=pair([1, 2, 3], [4, 5], [6, 7, 8])))]
    costs = {"padded": (6,), "packed": (11,), "shared": (8,), "seq2seq": (3, 3)}
    assert {name: token_costs(rows, plugins.layout(name)) for name in costs} == {n: [c] for n, c in costs.items()}
    assert token_costs(rows, plugins.layout("padded"), multiple_of=4) == [(8,)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), OPTIONS)
def test_ranks_get_as_many_batches_each_within_the_limit_and_all_rows_between_them(
    lengths: list[int], options: dict[str, Any]
) -> None:
    if options["max_tokens_per_batch"] is None:
        options["step_strategy"] = "pairs"
    try:
        samplers = epochs_of_ranks(lengths, 3, **options)
    except ConfigError:
        return  # told beforehand: the pairs of some step do not fit
    for epoch in range(3):
        ranks = [batches_of(sampler, epoch) for sampler in samplers]
        assert {len(batches) for batches in ranks} == {len(samplers[0])}
        batches = list(chain(*ranks))
        assert all(batches)
        if options["max_tokens_per_batch"] is not None:
            assert max(map(samplers[0].cost, batches)) <= options["max_tokens_per_batch"]
        seen = sorted(chain(*batches))
        assert set(seen) == set(range(len(lengths)))
        # At the end of an epoch there may be fewer pairs left than ranks; each of these needs one.
        assert len(seen) - len(lengths) < options["ranks"] * options["gradient_accumulation_steps"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), OPTIONS)
def test_a_step_has_the_pairs_of_plain_batches(lengths: list[int], options: dict[str, Any]) -> None:
    options = {**options, "max_tokens_per_batch": 10**6, "step_strategy": "pairs", "group_by_length": False}
    samplers = epochs_of_ranks(lengths, 1, **options)
    step = options["pairs_per_batch"] * options["gradient_accumulation_steps"] * options["ranks"]
    order = list(range(len(lengths)))
    if options["shuffle"]:
        accelerate = SeedableRandomSampler(order, data_seed=0)
        accelerate.set_epoch(2)
        order = list(accelerate)
    ranks = [batches_of(sampler, 2) for sampler in samplers]
    for index, start in enumerate(range(0, len(order) - step + 1, step)):
        first = index * options["gradient_accumulation_steps"]
        cut = [batches[first + i] for batches in ranks for i in range(options["gradient_accumulation_steps"])]
        assert sorted(chain(*cut)) == sorted(order[start : start + step])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[list[int]]:
        made = sampler_of(LENGTHS, max_tokens_per_batch=900, group_by_length=True, seed=seed, **options)
        return batches_of(made, epoch)

    for options in ({"gradient_accumulation_steps": 4}, {"step_strategy": "tokens"}):
        assert order(1, 2, **options) == order(1, 2, **options)
        assert order(1, 2, **options) != order(1, 3, **options)
        assert order(1, 2, **options) != order(2, 2, **options)


def test_a_step_spreads_its_tokens_evenly_over_batches_and_ranks() -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 4, "ranks": 2}

    def spread(start: int, limit: int | None) -> float:
        ranks = [sampler_of(LENGTHS, rank=rank, max_tokens_per_batch=limit, **options) for rank in range(2)]
        tokens = [ranks[0].cost(batch) for sampler in ranks for batch in list(sampler)[start : start + 4]]
        return (max(tokens) - min(tokens)) / (sum(tokens) / 8)

    for start in (0, 4, 8):
        assert spread(start, 10**6) < 0.2
        assert spread(start, None) > 0.5


def test_grouping_wastes_less_padding_and_stays_random() -> None:
    lengths = LENGTHS * 10
    plain = sampler_of(lengths, padded=True)
    grouped = sampler_of(lengths, padded=True, group_by_length=True)
    ideal = 2 * sum(lengths)

    def tokens(sampler: PairBatches, epoch: int) -> int:
        return sum(map(sampler.cost, batches_of(sampler, epoch)))

    assert tokens(plain, 0) > 1.4 * ideal
    assert tokens(grouped, 0) < 1.03 * ideal
    assert tokens(grouped, 1) < 1.03 * ideal
    longest = [max(lengths[row] for row in batch) for batch in batches_of(grouped, 0)]
    assert longest != sorted(longest, reverse=True)
    companions = [{row: frozenset(batch) for batch in batches_of(grouped, epoch) for row in batch} for epoch in (0, 1)]
    same = sum(companions[0][row] == companions[1][row] for row in range(len(lengths)))
    assert same < len(lengths) // 100


def test_within_a_large_step_grouping_leaves_the_steps_pairs_as_random_as_they_are() -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 25, "max_tokens_per_batch": 10**6}
    mean = sum(LENGTHS * 10) / len(LENGTHS * 10)
    made = list(sampler_of(LENGTHS * 10, group_by_length=True, **options))
    steps = [list(chain(*made[start : start + 25])) for start in range(0, 250, 25)]
    means = [sum((LENGTHS * 10)[row] for row in rows) / len(rows) for rows in steps]
    # Windows of two steps: half of the steps are longer than the mean, and none is all long or all short.
    assert all(0.3 * mean < value < 1.7 * mean for value in means)


def test_padded_batches_hold_pairs_of_a_length_where_a_step_is_cut_by_tokens() -> None:
    options: dict[str, Any] = {"padded": True, "gradient_accumulation_steps": 8}
    plain = sampler_of(SKEWED, **options)
    cut = sampler_of(SKEWED, max_tokens_per_batch=16000, **options)
    assert sum(map(cut.cost, cut)) < 0.6 * sum(map(plain.cost, plain))
    assert max(map(cut.cost, cut)) <= max(map(plain.cost, plain))


def test_batches_by_tokens_are_as_full_as_they_get_and_as_many_in_every_epoch() -> None:
    sampler = sampler_of(LENGTHS, max_tokens_per_batch=1500, step_strategy="tokens")
    sampler.plan(5)
    counts = {len(batches_of(sampler, epoch)) for epoch in range(5)}
    assert counts == {len(sampler)}
    assert len(sampler) == math.ceil(sum(LENGTHS) / 1500)
    assert max(len(batch) for batch in sampler) > 12


def test_ranks_end_together_in_epochs_that_were_not_planned() -> None:
    options: dict[str, Any] = {"max_tokens_per_batch": 250, "step_strategy": "tokens", "ranks": 2}
    samplers = [sampler_of(LENGTHS, rank=rank, **options) for rank in range(2)]
    counts = [[len(batches_of(sampler, epoch)) for sampler in samplers] for epoch in range(20)]
    assert all(first == second for first, second in counts)
    assert max(counts) > [len(samplers[0])] * 2


def test_tables_that_are_padded_apart_are_counted_apart() -> None:
    sampler = sampler_of([(10, 3), (2, 8)], padded=True)
    assert sampler.cost([0]) == 26
    assert sampler.cost([0, 1]) == 2 * 2 * (10 + 8)


def test_sequential_batches_keep_the_datasets_order() -> None:
    sampler = sampler_of([5] * 10, max_tokens_per_batch=15, step_strategy="tokens", shuffle=False, ranks=2)
    other = sampler_of([5] * 10, max_tokens_per_batch=15, step_strategy="tokens", shuffle=False, ranks=2, rank=1)
    in_turns = chain(*zip(sampler, other, strict=True))
    assert list(chain(*in_turns)) == list(range(10))


def test_what_fills_no_batch_is_dropped_where_asked() -> None:
    options: dict[str, Any] = {"pairs_per_batch": 3, "gradient_accumulation_steps": 2, "ranks": 2, "drop_last": True}
    samplers = epochs_of_ranks(list(range(1, 24)), 1, max_tokens_per_batch=1000, **options)
    assert sum(len(batch) for sampler in samplers for batch in sampler) == 18
    assert [len(sampler) for sampler in samplers] == [3, 3]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        (
            [10, 30],
            {"max_tokens_per_batch": 20},
            "row 1 of the prepared dataset takes 30 tokens by itself, more than max_tokens_per_batch=20: "
            "lower max_length",
        ),
        (
            [10] * 8,
            {"gradient_accumulation_steps": 2, "max_tokens_per_batch": 35},
            "the 8 pairs of one step take 80 tokens. They do not fit into 2 batches of at most "
            "max_tokens_per_batch=35: the largest batch would have 40 tokens. Raise gradient_accumulation_steps",
        ),
        ([1], {"pairs_per_batch": 0}, "pairs_per_batch is 0"),
        ([1], {"ranks": 2, "rank": 2}, "rank is 2: it must be one of the 2 ranks"),
        ([1], {"max_tokens_per_batch": 0}, "max_tokens_per_batch is 0: it must be None or a whole number"),
        ([1], {"step_strategy": "token"}, "unknown step_strategy 'token'; known: pairs, tokens"),
        ([1], {"step_strategy": "tokens"}, "fills batches up to max_tokens_per_batch, which is None: set it"),
    ],
)
def test_what_cannot_be_kept_is_named_beforehand(lengths: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler_of(lengths, **options).plan(1)
