"""Batches by tokens: nothing lost, nothing over the limit, the same again on resuming."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout_collate import pair

from orpo_plugins.batching import PairBatches, pair_tokens
from orpo_plugins.errors import ConfigError

LENGTHS = random.Random(0).choices(range(10, 201), k=101)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 8),
    st.sampled_from([None, 100, 300]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_every_row_is_in_one_batch_and_no_batch_is_over(lengths, pairs, max_tokens, grouped, padded, shuffle):
    sampler = PairBatches(
        lengths,
        pairs_per_batch=pairs,
        max_tokens=max_tokens,
        group_by_length=grouped,
        padded=padded,
        shuffle=shuffle,
    )
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= pairs for batch in batches)
    assert all(sampler.cost(batch) <= (max_tokens or 10**9) for batch in batches)
    assert len(sampler) == len(batches)


def test_the_order_depends_on_seed_and_epoch_alone():
    def sampler(seed, epoch):
        made = PairBatches(LENGTHS, pairs_per_batch=4, max_tokens=600, group_by_length=True, seed=seed)
        made.set_epoch(epoch)
        return list(made)

    assert sampler(1, 2) == sampler(1, 2)
    assert sampler(1, 2) != sampler(1, 3)
    assert sampler(1, 2) != sampler(2, 2)


def test_grouping_wastes_less_padding_and_stays_random():
    plain = PairBatches(LENGTHS * 10, pairs_per_batch=8, padded=True)
    grouped = PairBatches(LENGTHS * 10, pairs_per_batch=8, padded=True, group_by_length=True)

    def tokens(sampler):
        return sum(sampler.cost(batch) for batch in sampler)

    assert tokens(grouped) < 0.75 * tokens(plain)
    longest = [max(LENGTHS[row % len(LENGTHS)] for row in batch) for batch in grouped]
    assert longest != sorted(longest, reverse=True)


def test_a_step_keeps_its_pairs_and_spreads_them_evenly():
    plain = list(PairBatches(LENGTHS, pairs_per_batch=4, seed=3))
    even = PairBatches(LENGTHS, pairs_per_batch=4, accumulation=4, seed=3)
    batches = list(even)
    for start in range(0, 100, 16):
        cut = [batches[start // 4 + i] for i in range(4)] if start < 96 else batches[start // 4 :]
        rows = sorted(row for batch in cut for row in batch)
        assert rows == sorted(row for batch in plain[start // 4 : start // 4 + len(cut)] for row in batch)
        if start < 96:
            heaviest = max(even.cost(batch) for batch in cut)
            assert heaviest <= max(even.cost(batch) for batch in plain[start // 4 : start // 4 + 4])


def test_limits_that_cannot_be_kept_are_named():
    with pytest.raises(ConfigError, match="row 1 takes 30 tokens by itself, more than max_tokens=20"):
        PairBatches([10, 30], pairs_per_batch=2, max_tokens=20)
    with pytest.raises(ConfigError, match="raise gradient_accumulation_steps or max_tokens"):
        list(PairBatches([10, 10, 10, 10], pairs_per_batch=2, accumulation=2, max_tokens=15))
    with pytest.raises(ConfigError, match="pairs_per_batch is 0"):
        PairBatches([1], pairs_per_batch=0)


def test_tokens_of_a_pair():
    one = pair([1, 2, 3], [4, 5], [6, 7, 8])
    assert pair_tokens(one, "packed") == 11
    assert pair_tokens(one, "shared") == 8
