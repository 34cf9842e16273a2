"""Lengths: the prompt is cut first, then each answer to its own room; no answer is ever empty."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder
from orpo_plugins.hooks.types import Preference, TokenSequence
from orpo_plugins.options import PairOptions
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer, inst_tokenizer

TOKENIZERS = [chatml_tokenizer(), inst_tokenizer(), gpt2_tokenizer()]
CHATML = TOKENIZERS[0]
WORDS = ("fox", "dog", "quick", "it", "order", "1234", "\n", "unbelievable", ":")


def prompt_of(sequence: TokenSequence) -> list[int]:
    start = next(i for i, label in enumerate(sequence.labels) if label != -100)
    return sequence.input_ids[:start]


def answer_of(sequence: TokenSequence) -> list[int]:
    return [label for label in sequence.labels if label != -100]


def built(preference: Preference, tokenizer: Any = CHATML, **options: Any) -> BuiltPair:
    result = PairBuilder(tokenizer, PairOptions(**options))(preference)
    assert isinstance(result, BuiltPair), result
    return result


def lengths(result: BuiltPair) -> tuple[int, int, int]:
    """Tokens of the prompt, the chosen and the rejected answer."""
    pair = result.pair
    return len(prompt_of(pair.chosen)), len(answer_of(pair.chosen)), len(answer_of(pair.rejected))


def preference(prompt: int, chosen: int, rejected: int) -> Preference:
    """So many tokens each, with BOS in the prompt and EOS in the answers."""
    texts = [(" fox", prompt - 1), (" dog", chosen - 1), (" it", rejected - 1)]
    asked, good, bad = (word * count for word, count in texts)
    made = Preference(prompt=asked, chosen=good, rejected=bad)
    assert lengths(built(made, max_length=None)) == (prompt, chosen, rejected)
    return made


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ((10, 10, 5), {"max_length": 20}, (10, 10, 5)),
        ((10, 10, 5), {"max_length": 19}, (9, 10, 5)),  # the prompt makes room for the longer answer
        ((10, 10, 5), {"max_length": 16}, (8, 8, 5)),  # down to half of max_length, then the longer answer is cut
        ((10, 10, 5), {"max_length": 4}, (2, 2, 2)),
        ((3, 30, 5), {"max_length": 16}, (3, 13, 5)),  # each answer has the room that the prompt leaves
        ((30, 3, 5), {"max_length": 16}, (11, 3, 5)),
        ((10, 10, 5), {"max_length": 20, "max_prompt_length": 4}, (4, 10, 5)),
        ((10, 10, 5), {"max_length": 12, "max_prompt_length": 4}, (4, 8, 5)),
        ((10, 10, 5), {"max_length": None, "max_prompt_length": 4}, (4, 10, 5)),
        ((10, 10, 5), {"max_length": 20, "max_completion_length": 4}, (10, 4, 4)),
        ((10, 10, 5), {"max_length": 12, "max_completion_length": 4}, (8, 4, 4)),
        ((10, 10, 5), {"max_length": None}, (10, 10, 5)),
        ((2000, 10, 5), {}, (1014, 10, 5)),
    ],
)
def test_who_gives_way(sizes: tuple[int, int, int], options: dict[str, Any], expected: tuple[int, int, int]) -> None:
    result = built(preference(*sizes), **options)
    assert lengths(result) == expected
    flags = (result.prompt_truncated, result.chosen_truncated, result.rejected_truncated)
    assert flags == tuple(size > kept for size, kept in zip(sizes, expected, strict=True))


def test_which_end_of_the_prompt_stays() -> None:
    made = Preference(prompt="the quick brown fox", chosen=" sleeps", rejected=" jumps")
    texts = {
        mode: CHATML.decode(prompt_of(built(made, max_prompt_length=3, truncation_mode=mode).pair.chosen))
        for mode in ("keep_end", "keep_start")
    }
    assert texts == {"keep_end": "<s> brown fox", "keep_start": "<s>the quick"}


def test_eos_ends_an_answer_that_is_whole_and_no_other() -> None:
    result = built(preference(5, 20, 3), max_length=12)
    assert CHATML.eos_token_id not in result.pair.chosen.input_ids
    assert result.pair.rejected.input_ids[-1] == CHATML.eos_token_id


def test_one_answer_of_a_single_token_is_enough() -> None:
    assert lengths(built(preference(50, 40, 2), max_length=2)) == (1, 1, 1)


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join).filter(str.strip)
limits = st.none() | st.integers(2, 60)


@st.composite
def options(draw: st.DrawFn) -> PairOptions:
    longest = draw(limits)
    return PairOptions(
        max_length=longest,
        max_prompt_length=draw(st.none() | st.integers(1, 20 if longest is None else longest - 1)),
        max_completion_length=draw(st.none() | st.integers(1, 20)),
        truncation_mode=draw(st.sampled_from(["keep_end", "keep_start"])),
    )


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    tokenizer=st.sampled_from(TOKENIZERS),
    prompt=texts,
    chosen=texts,
    rejected=texts,
    options=options(),
    chat=st.booleans(),
)
def test_any_lengths(tokenizer: Any, prompt: str, chosen: str, rejected: str, options: PairOptions, chat: bool) -> None:
    made = Preference(prompt=prompt, chosen=chosen, rejected=rejected)
    if chat and tokenizer.chat_template is not None:
        made = Preference(
            prompt=[{"role": "user", "content": prompt}],
            chosen=[{"role": "assistant", "content": chosen}],
            rejected=[{"role": "assistant", "content": rejected}],
        )
    whole = PairBuilder(tokenizer, PairOptions(max_length=None))(made)
    cut = PairBuilder(tokenizer, options)(made)
    if isinstance(whole, Dropped) or isinstance(cut, Dropped):
        for result in (whole, cut):
            assert isinstance(result, BuiltPair) or result.reason.startswith("chosen equals rejected")
        return
    longest_answer = max(len(answer_of(s)) for s in (whole.pair.chosen, whole.pair.rejected))
    for name in ("chosen", "rejected"):
        before, after = getattr(whole.pair, name), getattr(cut.pair, name)
        assert_cut_right(before, after, options, tokenizer, getattr(cut, f"{name}_truncated"))
        fits = options.max_length is None or len(prompt_of(before)) + longest_answer <= options.max_length
        if fits and options.max_prompt_length is None:
            assert prompt_of(after) == prompt_of(before)
    if prompt_of(whole.pair.chosen) == prompt_of(whole.pair.rejected):
        assert prompt_of(cut.pair.chosen) == prompt_of(cut.pair.rejected)


def assert_cut_right(
    before: TokenSequence, after: TokenSequence, options: PairOptions, tokenizer: Any, truncated: bool
) -> None:
    prompt, answer = prompt_of(after), answer_of(after)
    assert after.labels == [-100] * len(prompt) + answer
    assert after.input_ids == prompt + answer
    assert len(after.input_ids) <= (options.max_length or 10**9)
    assert len(prompt) <= (options.max_prompt_length or 10**9)
    assert 1 <= len(answer) <= (options.max_completion_length or 10**9)
    whole_answer = answer_of(before)
    assert answer == whole_answer[: len(answer)]
    assert truncated == (len(answer) < len(whole_answer))
    if not truncated:
        assert answer[-1] == tokenizer.eos_token_id
    elif whole_answer.count(tokenizer.eos_token_id) == 1:  # a template may write one of its own before the last token
        assert tokenizer.eos_token_id not in answer
    if truncated and options.max_length is not None and options.max_completion_length is None:
        # Prompt first: an answer only loses tokens once the prompt is down to half, and none to spare.
        assert len(prompt) <= max(1, options.max_length // 2)
        assert len(after.input_ids) == options.max_length
    bos, asked = tokenizer.bos_token_id, prompt_of(before)
    assert prompt[:1] == [bos]
    kept = len(prompt) - 1
    assert prompt[1:] == (
        asked[1:][len(asked) - 1 - kept :] if options.truncation_mode == "keep_end" else asked[1:][:kept]
    )
