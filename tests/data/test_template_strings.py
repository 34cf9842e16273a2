"""`template_strings`: rows of strings become conversations, written with the chat template."""

import re
from pathlib import Path
from typing import Any

import pytest

from orpo_plugins import ORPOCollator
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.options import PairOptions
from tests.kit import tiny, tools
from tests.kit.training import trainer

STRINGS = {"prompt": "order today", "chosen": "gladly", "rejected": "never"}
CONVERSATION = {
    "prompt": [{"role": "user", "content": "order today"}],
    "chosen": [{"role": "assistant", "content": "gladly"}],
    "rejected": [{"role": "assistant", "content": "never"}],
}
IMPLICIT = {"chosen": "order today: gladly", "rejected": "order today: never"}
TEMPLATED = {
    "prompt": "<|user|>order today</s><|assistant|>",
    "chosen": "gladly</s>",
    "rejected": "never</s>",
}


def prepared(row: dict[str, Any], tokenizer: Any = None, **options: Any) -> list[dict[str, Any]]:
    return list(prepare_dataset([row], tokenizer or tiny.tokenizer(), PairOptions(**options))[0])


def test_strings_are_what_the_conversation_is() -> None:
    assert prepared(STRINGS, template_strings=True) == prepared(CONVERSATION)
    row = prepared(STRINGS, template_strings=True)[0]
    labels = [label for label in row["chosen_labels"] if label != -100]
    assert tiny.tokenizer().decode(row["chosen_input_ids"]) == "<s><|user|>order today</s><|assistant|>gladly</s>"
    assert tiny.tokenizer().decode(labels) == "gladly</s>"


def test_without_it_they_are_joined() -> None:
    row = prepared(STRINGS)[0]
    assert tiny.tokenizer().decode(row["chosen_input_ids"]) == "<s>order todaygladly</s>"


def test_conversations_and_templated_strings_stay_as_they_are() -> None:
    for row in (CONVERSATION, TEMPLATED):
        assert prepared(row, template_strings=True) == prepared(row)


def test_answers_that_hold_a_conversation_written_as_text_stay_as_they_are() -> None:
    prompt = "Human: please order today Assistant:"
    row = {"prompt": prompt, "chosen": f"{prompt} gladly", "rejected": f"{prompt} never"}
    assert prepared(row, template_strings=True) == prepared(row)
    assert tiny.tokenizer().decode(prepared(row)[0]["chosen_input_ids"]) == f"<s>{prompt} gladly</s>"


def test_system_tools_and_a_missing_rejected_answer_are_as_in_conversations() -> None:
    system = {"system": "please"}
    assert prepared(STRINGS | system, template_strings=True) == prepared(CONVERSATION | system)
    given = {"tools": tools.TOOLS}
    template = tiny.tokenizer(tools.TEMPLATE)
    assert prepared(STRINGS | given, template, template_strings=True) == prepared(CONVERSATION | given, template)
    alone = {"rejected": None}
    found = prepared(STRINGS | alone, template_strings=True, sft_rows=True)
    assert found == prepared(CONVERSATION | alone, sft_rows=True)
    assert found[0]["rejected_input_ids"] == []


def test_the_report_counts_how_strings_were_read() -> None:
    rows = [STRINGS, STRINGS | {"prompt": "parcel"}, TEMPLATED, CONVERSATION, STRINGS | {"system": "please"}]
    for options, joined, templated in ((PairOptions(), 2, 1), (PairOptions(template_strings=True), 0, 3)):
        _, report = prepare_dataset(rows, tiny.tokenizer(), options)
        assert (report.strings_joined, report.strings_templated) == (joined, templated)


def test_an_implicit_prompt_is_refused_because_it_may_hold_the_beginning_of_the_answers() -> None:
    with pytest.raises(RowError, match=r"row 0: template_strings=True, but the row has no prompt column"):
        prepared(IMPLICIT, template_strings=True)
    templated = {name: f"<|user|>{text}" for name, text in IMPLICIT.items()}
    assert prepared(templated, template_strings=True) == prepared(templated)
    # Both remedies.
    assert prepared(IMPLICIT)
    assert prepared({"prompt": "order today:", "chosen": " gladly", "rejected": " never"}, template_strings=True)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    message = "template_strings=True needs a chat template, but the tokenizer has none: set tokenizer.chat_template"
    with pytest.raises(ConfigError, match=re.escape(message)):
        ORPOCollator(tiny.tokenizer(None), template_strings=True)


def test_trainer_and_collator_have_it(tmp_path: Path) -> None:
    expected = prepared(CONVERSATION)[0]["chosen_input_ids"]
    made = trainer(tmp_path, rows=[STRINGS] * 2, processing_class=tiny.tokenizer(), template_strings=True)
    assert made.train_dataset[0]["chosen_input_ids"] == expected
    batch = ORPOCollator(tiny.tokenizer(), template_strings=True)([STRINGS])
    assert batch["input_ids"][0].tolist() == expected
    assert made.data_collator.pairs([STRINGS])[0].chosen.input_ids == expected
