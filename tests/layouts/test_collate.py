"""Packed and shared batches: which token stands where, what predicts it, and what it attends to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_plugins.hooks.types import Pair
from orpo_plugins.layouts.packed import Packed
from orpo_plugins.layouts.padded import Padded
from orpo_plugins.layouts.shared import Shared, common_prefix
from orpo_plugins.layouts.spans import SPANS
from orpo_plugins.targets import Targets
from tests.kit.laid_out import pair, sequence

PAIRS = [pair([1, 2, 3], [4, 5], [6, 7, 8]), pair([9], [10], [11, 12])]


def test_packed_rows_restart_positions_with_each_sequence():
    batch = Packed().collate(PAIRS, pad_token_id=0, nll_over="sequence")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 10, 9, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2]]
    assert [tuple(span) for span in batch[SPANS].spans] == [(0, 5, 0, 0), (5, 6, 0, 0), (11, 2, 0, 0), (13, 3, 0, 0)]


def test_shared_rows_hold_the_prompt_once_and_the_rejected_answer_continues_from_it():
    batch = Shared().collate(PAIRS, pad_token_id=0, nll_over="sequence")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2]]
    assert [tuple(span) for span in batch[SPANS].spans] == [(0, 5, 0, 0), (5, 3, 0, 3), (8, 2, 0, 0), (10, 2, 8, 1)]


def test_the_last_prompt_row_predicts_both_first_tokens():
    batch = Shared().collate(PAIRS[:1], pad_token_id=0, nll_over="completion")
    assert batch["labels"].tolist() == [[2, 4, 0, 3], [3, 5, 0, 3], [2, 6, 1, 1], [5, 7, 1, 1], [6, 8, 1, 1]]


def test_the_nll_over_the_sequence_takes_the_prompt_from_the_chosen_side_once():
    labels = Shared().collate(PAIRS[:1], pad_token_id=0, nll_over="sequence")["labels"]
    assert [line for line in labels.tolist() if line[3] & 2] == [[0, 2, 0, 2], [1, 3, 0, 2], [2, 4, 0, 3], [3, 5, 0, 3]]


def test_answers_that_begin_alike_share_those_tokens_and_count_them_twice():
    batch = Shared().collate([pair([1], [2, 3], [2, 4])], pad_token_id=0, nll_over="completion")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[0, 2, 0, 3], [1, 3, 0, 3], [0, 2, 1, 1], [1, 4, 1, 1]]


def test_an_answer_that_is_the_beginning_of_the_other_adds_no_rows():
    batch = Shared().collate([pair([1], [2, 3, 4], [2, 3])], pad_token_id=0, nll_over="completion")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert len(batch[SPANS].spans) == 1
    assert [line for line in batch["labels"].tolist() if line[2] == 1] == [[0, 2, 1, 1], [1, 3, 1, 1]]


def test_prompts_that_differ_from_the_start_share_nothing():
    other = Pair(chosen=sequence([1, 2], [3]), rejected=sequence([4, 2], [5]))
    batch = Shared().collate([other], pad_token_id=0, nll_over="sequence")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 2, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert [span.context_length for span in batch[SPANS].spans] == [0, 0]


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [], 0), ([1], [1, 2], 1), ([1, 2], [1, 3], 1), ([1], [2], 0)]
)
def test_common_prefix(first, second, length):
    assert common_prefix(first, second) == length


tokens = st.lists(st.integers(1, 3), max_size=6)
drawn = st.lists(st.tuples(tokens, tokens, tokens, tokens), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(drawn, st.sampled_from(["sequence", "completion"]))
def test_every_layout_makes_the_same_predictions_from_the_same_history(drawn, nll_over):
    """Line by line: the row's token, its position and all it can see are those of the padded batch."""
    pairs = [Pair(chosen=sequence(p, [*c, 9]), rejected=sequence([*p, *q], [*r, 8])) for p, q, c, r in drawn]
    expected = Padded().collate(pairs, pad_token_id=0, nll_over=nll_over)
    for layout in (Packed(), Shared()):
        found = layout.collate(pairs, pad_token_id=0, nll_over=nll_over)
        assert torch.equal(found["labels"][:, 1:], expected["labels"][:, 1:])
        assert torch.equal(found["shift_labels"], expected["shift_labels"])
        for line, (row, _, number, _) in enumerate(found["labels"].tolist()):
            of_line = pairs[number].chosen if number < len(pairs) else pairs[number - len(pairs)].rejected
            position = int(expected["labels"][line, 0]) % expected["input_ids"].shape[1]
            assert visible(found, row) == list(zip(range(position + 1), of_line.input_ids, strict=False))
        covered = [row for span in found[SPANS].spans for row in range(span.start, span.start + span.length)]
        assert covered == list(range(found["input_ids"].shape[1]))


def visible(batch, row):
    """(position, token) of everything that a row attends to."""
    span = next(span for span in batch[SPANS].spans if span.start <= row < span.start + span.length)
    context = range(span.context_start, span.context_start + span.context_length)
    rows = [*context, *range(span.start, row + 1)]
    return [(int(batch["position_ids"][0, r]), int(batch["input_ids"][0, r])) for r in rows]


def test_lines_of_a_pair_stand_together():
    labels = Shared().collate(PAIRS, pad_token_id=0, nll_over="sequence")["labels"]
    assert Targets.from_table(labels, 2).sequence_ids.unique_consecutive().tolist() == [0, 2, 1, 3]
