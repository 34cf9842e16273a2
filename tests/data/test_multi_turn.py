"""Answers of several turns: every assistant turn is trained, or the last one with all before it as its prompt."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from orpo_plugins import errors
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.options import PairOptions
from tests.kit import tiny
from tests.kit.encoder_decoder import tokenizer as seq2seq_tokenizer


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROW = {
    "prompt": [message("user", "order"), message("assistant", "number"), message("user", "today")],
    "chosen": [message("assistant", "gladly"), message("user", "later"), message("assistant", "please")],
    "rejected": [message("assistant", "never"), message("user", "later"), message("assistant", "sorry")],
}


LONGER = {**ROW, "chosen": [*ROW["chosen"], message("user", "call"), message("assistant", "desk")]}


def texts(side: str, tokenizer: Any, row: dict[str, Any] = ROW, **options: Any) -> tuple[str, str]:
    """(everything before the first label, what is labelled), decoded."""
    dataset, _ = prepare_dataset([row], tokenizer, PairOptions(**options))
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


# Opens every answer with an empty reasoning block, and leaves it out of turns that others have followed (Qwen 3.5).
REASONING = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' and loop.last %}<none>{% endif %}{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><none>{% endif %}"
)


def test_turns_that_a_template_rewrites_once_others_follow_are_trained_whole() -> None:
    assert texts("chosen", tiny.tokenizer(REASONING), LONGER)[1] == "gladly</s>please</s>desk</s>"
    assert texts("chosen", tiny.tokenizer(REASONING), LONGER, train_on="last")[1] == "desk</s>"


def templates() -> list[Path]:
    """The chat templates that TRL brings, those of models as they are published."""
    found = importlib.util.find_spec("trl")
    folder = Path(str(found.origin)).parent / "chat_templates" if found else Path("none")
    takes_parts = ("idefics3", "llava_next", "smolvlm")  # and writes no text of a message whose content is a string
    return [path for path in sorted(folder.glob("*.jinja")) if path.stem.removesuffix("_training") not in takes_parts]


@pytest.mark.parametrize("template", templates(), ids=lambda path: path.stem)
def test_with_the_templates_of_models_the_assistants_turns_are_trained_and_no_others(template: Path) -> None:
    answer = texts("chosen", tiny.tokenizer(template.read_text()), LONGER)[1]
    assert re.findall("order|number|today|gladly|later|please|call|desk", answer) == ["gladly", "please", "desk"]


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
