"""On rows that nothing truncates, ids and labels are those of TRL's ORPOTrainer.tokenize_row, of the installed TRL."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder
from orpo_plugins.data.row_formats import parse_row
from orpo_plugins.options import PairOptions
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer, inst_tokenizer

TOKENIZERS = {"chatml": chatml_tokenizer(), "inst": inst_tokenizer(), "gpt2": gpt2_tokenizer()}
WORDS = ["the quick", " brown", "fox", " unbelievable", "answer", "ing", " 1234", ":", " ", "\n", "\n\n", "é", "."]


def trl_row(tokenizer: Any, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """What TRL's trainer makes of a row, without a trainer around it."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    data_utils = pytest.importorskip("trl.data_utils")
    trainer = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=10**9)
    trainer.build_tokenized_answer = lambda *texts: orpo.ORPOTrainer.build_tokenized_answer(trainer, *texts)
    row = data_utils.maybe_apply_chat_template(data_utils.maybe_extract_prompt(dict(row)), tokenizer)
    return dict(orpo.ORPOTrainer.tokenize_row(trainer, row))


def our_row(tokenizer: Any, row: Mapping[str, Any]) -> dict[str, list[int]]:
    built = PairBuilder(tokenizer, PairOptions(max_length=None, repeat_eos=True))(parse_row(row, 0))
    assert isinstance(built, BuiltPair), built
    pair = built.pair
    return {
        "chosen_input_ids": pair.chosen.input_ids,
        "chosen_labels": pair.chosen.labels,
        "rejected_input_ids": pair.rejected.input_ids,
        "rejected_labels": pair.rejected.labels,
    }


def assert_same(tokenizer: Any, row: Mapping[str, Any]) -> None:
    ours = our_row(tokenizer, row)
    theirs = trl_row(tokenizer, row)
    assert ours == {column: theirs[column] for column in ours}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "please cancel my order", "chosen": " of course", "rejected": " never"},
        {"prompt": "please cancel my order ", "chosen": "of course", "rejected": "never"},
        {"prompt": "the dog jum", "chosen": "ps", "rejected": "ping"},
        {"prompt": "answer", "chosen": "ing machines", "rejected": " the dog"},
        {"prompt": "Q:\n", "chosen": "\nthe fox", "rejected": "the dog"},
        {"chosen": "my order: of course", "rejected": "my order: never"},
    ],
    ids=[
        "space before",
        "space after",
        "inside a word",
        "merge in one answer",
        "newlines",
        "implicit",
    ],
)
def test_rows_of_strings(name: str, row: dict[str, str]) -> None:
    assert_same(TOKENIZERS[name], row)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_implicit_prompt_ends_at_a_word_where_trl_cuts_the_word(name: str) -> None:
    row = {"chosen": "my order: refund", "rejected": "my order: really"}
    ours, theirs = our_row(TOKENIZERS[name], row), trl_row(TOKENIZERS[name], row)
    assert ours["rejected_input_ids"] == theirs["rejected_input_ids"]
    answer = [token for token in ours["rejected_labels"] if token != -100]
    assert TOKENIZERS[name].decode(answer, skip_special_tokens=True).strip() == "really"
    assert sum(token != -100 for token in theirs["rejected_labels"]) < len(answer)


def test_bos_and_eos_in_the_text_are_not_doubled() -> None:
    tokenizer = TOKENIZERS["chatml"]
    row = {"prompt": "<s>the dog", "chosen": " sleeps<|im_end|>", "rejected": " jumps"}
    assert_same(tokenizer, row)
    ids = our_row(tokenizer, row)["chosen_input_ids"]
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "explicit": {
        "prompt": [user("the quick fox")],
        "chosen": [assistant("jumps")],
        "rejected": [assistant("sleeps")],
    },
    "implicit": {
        "chosen": [user("the quick fox"), assistant("jumps")],
        "rejected": [user("the quick fox"), assistant("sleeps")],
    },
    "prompt as a string too": {
        "prompt": "the quick fox",
        "chosen": [user("the quick fox"), assistant("jumps")],
        "rejected": [user("the quick fox"), assistant("sleeps")],
    },
    "several turns": {
        "prompt": [user("the dog"), assistant("sleeps"), user("and then")],
        "chosen": [assistant("it jumps")],
        "rejected": [assistant("it sleeps")],
    },
    "white space": {
        "prompt": [user("the dog ")],
        "chosen": [assistant("  it jumps \n")],
        "rejected": [assistant("\nit sleeps")],
    },
    "answers that begin alike": {
        "prompt": [user("the dog")],
        "chosen": [assistant("the dog jumps")],
        "rejected": [assistant("the dog sleeps")],
    },
}


@pytest.mark.parametrize("name", ["chatml", "inst"])
@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_conversations(name: str, row: dict[str, Any]) -> None:
    assert_same(TOKENIZERS[name], row)


def test_a_system_message() -> None:
    row = CONVERSATIONS["explicit"]
    assert_same(TOKENIZERS["chatml"], {**row, "prompt": [{"role": "system", "content": "well"}, *row["prompt"]]})


OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n"
CONTENT = "{{ message['content'] }}"


def changed_template(tokenizer: Callable[[], Any], old: str, new: str) -> Any:
    made = tokenizer()
    assert old in made.chat_template
    made.chat_template = made.chat_template.replace(old, new)
    return made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # The generation prompt opens a reasoning block that a finished answer does not have.
        (OPENING, f"{OPENING}<think>\n"),
        # A finished answer has an empty reasoning block that the generation prompt does not open.
        (CONTENT, "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + CONTENT),
        (CONTENT, "{{ message['content'] | trim }}"),
        # The role's line ends with a space that the answer's first word takes up.
        (OPENING, f"{OPENING} "),
    ],
    ids=["opens a reasoning block", "writes a reasoning block", "trims", "opens with a space"],
)
@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_templates_that_rewrite(old: str, new: str, row: dict[str, Any]) -> None:
    assert_same(changed_template(chatml_tokenizer, old, new), row)


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join).filter(str.strip)


def merges_more_than_one_token(tokenizer: Any, prompt: str, answer: str) -> bool:
    """Whether the whole text changes more than the prompt's last token: there TRL leaves answer tokens out."""
    alone, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
    return bool(alone[:-1] != whole[: len(alone) - 1])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_any_strings(name: str, prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = TOKENIZERS[name]
    if any(merges_more_than_one_token(tokenizer, prompt, answer) for answer in (chosen, rejected)):
        return
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    built = PairBuilder(tokenizer, PairOptions(max_length=None, repeat_eos=True))(parse_row(row, 0))
    if isinstance(built, Dropped):
        assert chosen == rejected
    elif not built.repaired:
        assert_same(tokenizer, row)


def test_every_token_with_text_of_the_answer_is_labelled_where_several_merge() -> None:
    # With the answer after it, "unbeliev" is no longer tokenized as on its own, by more than its last token.
    tokenizer, row = TOKENIZERS["gpt2"], {"prompt": "unbeliev", "chosen": "able answers", "rejected": "ably well"}
    assert merges_more_than_one_token(tokenizer, row["prompt"], row["chosen"])
    labelled = [token for token in our_row(tokenizer, row)["chosen_labels"] if token != -100]
    assert tokenizer.decode(labelled) == "unbelievable answers<|endoftext|>"
