"""Answers of several turns: every assistant turn is trained, or the last one with all before it as its prompt."""

from typing import Any

import pytest
import tiny
from test_seq2seq import tokenizer as seq2seq_tokenizer

from orpo_plugins import errors
from orpo_plugins.pairs import PairOptions
from orpo_plugins.preparation import prepare_dataset


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROW = {
    "prompt": [message("user", "order"), message("assistant", "number"), message("user", "today")],
    "chosen": [message("assistant", "gladly"), message("user", "later"), message("assistant", "please")],
    "rejected": [message("assistant", "never"), message("user", "later"), message("assistant", "sorry")],
}


def texts(side: str, tokenizer: Any, **options: Any) -> tuple[str, str]:
    """(everything before the first label, what is labelled), decoded."""
    dataset, _ = prepare_dataset([ROW], tokenizer, PairOptions(**options))
    ids, labels = dataset[0][f"{side}_input_ids"], dataset[0][f"{side}_labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    return tokenizer.decode(ids[:start]), tokenizer.decode([label for label in labels if label != -100])


def test_every_assistant_turn_of_the_answer_is_trained() -> None:
    assert texts("chosen", tiny.tokenizer())[1] == "gladly</s>please</s>"
    assert texts("rejected", tiny.tokenizer())[1] == "never</s>sorry</s>"


def test_or_the_last_alone() -> None:
    prompt, answer = texts("rejected", tiny.tokenizer(), train_on="last")
    assert answer == "sorry</s>"
    assert prompt.endswith("<|assistant|>never</s><|user|>later</s><|assistant|>")


def test_the_last_turn_of_an_encoder_decoder_model_has_the_rest_in_its_encoder() -> None:
    prompt, answer = texts("chosen", seq2seq_tokenizer(), train_on="last", encoder_decoder=True)
    assert answer == "please</s>"
    assert prompt.endswith("<|assistant|>gladly<|user|>later<|assistant|></s>")


def test_turns_that_both_have_in_common_are_prompt() -> None:
    for train_on in ("all_assistant", "last"):
        assert "<|assistant|>number</s>" in texts("chosen", tiny.tokenizer(), train_on=train_on)[0]


def test_an_answer_of_one_turn_is_the_same_in_both() -> None:
    rows = tiny.conversations(3)
    prepared = [prepare_dataset(rows, tiny.tokenizer(), PairOptions(train_on=t))[0] for t in ("all_assistant", "last")]
    assert list(prepared[0]) == list(prepared[1])


def test_tokenized_rows_stay_as_they_are() -> None:
    options = PairOptions(train_on="last", max_prompt_length=20, max_length=200)
    dataset, _ = prepare_dataset([ROW], tiny.tokenizer(), options)
    again, report = prepare_dataset(dataset, tiny.tokenizer(), options)
    assert list(again) == list(dataset)
    assert report.prompt_truncated == 0


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(errors.ConfigError, match="unknown train_on 'first'; known: all_assistant, last"):
        PairOptions(train_on="first")
