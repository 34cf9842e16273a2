"""Tools, their calls and their answers: trained as the chat template writes them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from orpo_plugins.data.row_formats import parse_row
from orpo_plugins.errors import RowError
from tests.kit import tiny
from tests.kit.tools import ANSWERED, ASKED, MERGED, REASONING, STRICT, TEMPLATE, TOOLS, WHOLE, templated, texts, turn
from tests.kit.training import trainer


@pytest.mark.parametrize("row", [ASKED, ANSWERED, WHOLE], ids=["asked", "answered", "whole"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_text_is_that_of_the_template_with_its_tools(row: dict[str, Any], side: str) -> None:
    text = templated(row, side)
    assert texts(row, side)[0] == text
    assert text.startswith('<s><|system|>{"type": "function"')


def test_prompt_and_answers_are_those_of_trl() -> None:
    apply = pytest.importorskip("trl.data_utils").apply_chat_template
    tokenizer = tiny.tokenizer(TEMPLATE)
    for row in (ASKED, ANSWERED):
        clean = {
            name: [{**message, "content": message["content"] or ""} for message in row[name]]
            for name in ("prompt", "chosen", "rejected")
        }
        theirs = apply(clean, tokenizer, tools=row["tools"])
        for side in ("chosen", "rejected"):
            assert texts(row, side) == (theirs["prompt"] + theirs[side], theirs[side])


def test_calls_are_trained_and_what_tools_answer_is_not() -> None:
    assert texts(ASKED)[1] == '[order {"parcel": "desk"}]</s>'
    assert texts(ANSWERED)[1] == "gladly</s>"
    assert texts(WHOLE)[1] == '[order {"parcel": "desk"}]</s>gladly</s>'
    assert texts(WHOLE, train_on="last")[1] == "gladly</s>"


def test_a_template_that_wants_a_call_before_a_tools_answer_is_given_one() -> None:
    row = {name: value for name, value in WHOLE.items() if name != "tools"}
    assert texts(row, "chosen", STRICT) == (templated(row, "chosen", STRICT), "[order]</s>gladly</s>")


def test_what_a_tool_answers_inside_the_turn_that_called_it_is_not_trained() -> None:
    row = {name: value for name, value in WHOLE.items() if name != "tools"}
    text = "<s><|user|>order today</s><|assistant|>[order]parcel later<|assistant|>gladly</s>"
    assert texts(row, "chosen", MERGED) == (text, "[order]gladly</s>")


def test_a_question_after_a_tools_answer_changes_nothing_in_what_is_trained() -> None:
    row = {name: value for name, value in WHOLE.items() if name != "tools"}
    row["chosen"] = [*WHOLE["chosen"], turn("user", "call"), turn("assistant", "please")]
    assert texts(row, "chosen", REASONING)[1] == "[order]</s>gladly</s>please</s>"


def test_rows_train_from_a_dataset_whose_columns_arrow_has_filled_up(tmp_path: Path) -> None:
    rows = [ASKED, ANSWERED, WHOLE]
    dataset = Dataset.from_list(rows)
    made = trainer(tmp_path, rows=dataset, processing_class=tiny.tokenizer(TEMPLATE), max_steps=1, max_length=None)
    for number, row in enumerate(rows):
        found = tiny.tokenizer().decode(made.train_dataset[number]["chosen_input_ids"])
        assert found == templated(row, "chosen")
    made.train()
    properties = dataset[0]["tools"][0]["function"]["parameters"]["properties"]
    assert properties.keys() == {"parcel", "invoice"}


def test_no_calls_are_no_key() -> None:
    row = parse_row({**ASKED, "chosen": [turn("assistant", "gladly", tool_calls=[])]}, 0)
    assert row.chosen == [turn("assistant", "gladly")]


def test_template_arguments_of_other_rows_are_no_arguments() -> None:
    dataset = Dataset.from_list([{**ASKED, "chat_template_kwargs": given} for given in ({"a": False}, {"b": 1}, None)])
    found = [parse_row({**dataset[number], "tools": None}, number).template_arguments for number in range(3)]
    assert found == [{"a": False}, {"b": 1}, {}]


@pytest.mark.parametrize("tools", [json.dumps(TOOLS), TOOLS, [*TOOLS[:1], {**TOOLS[1], "strict": None}]])
def test_tools_may_be_json_text(tools: Any) -> None:
    assert parse_row({**ASKED, "tools": tools}, 0).template_arguments["tools"] == TOOLS


def test_no_tools_are_no_argument() -> None:
    for nothing in (None, [], "", "[]", "null"):
        assert "tools" not in parse_row({**ASKED, "tools": nothing}, 0).template_arguments


def test_sharegpts_calls_and_observations() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "order today"},
            {"from": "function_call", "value": json.dumps({"name": "order", "arguments": {"parcel": "desk"}})},
            {"from": "observation", "value": "parcel later"},
        ],
        "chosen": {"from": "gpt", "value": "gladly"},
        "rejected": {"from": "gpt", "value": "never"},
        "tools": json.dumps(TOOLS),
    }
    assert texts(row) == texts(ANSWERED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": "order"}, "row 4 (conversational): column 'tools' is str 'order', which is not valid JSON"),
        ({"tools": 3}, "column 'tools' is int 3, expected a list of JSON schemas, or the JSON text of one"),
        ({"tools": '{"a": 1}'}, "column 'tools' is str '{\"a\": 1}', expected a list of JSON schemas"),
        (
            {"prompt": [turn("user", "order"), {"from": "function_call", "value": "order()"}]},
            "message 1 of column 'prompt' is str 'order()', which is not valid JSON",
        ),
        (
            {"prompt": [turn("user", "order"), {"from": "function_call", "value": "[]"}]},
            "message 1 of column 'prompt' is str '[]', expected the JSON of a call: name and arguments",
        ),
        ({"chat_template_kwargs": "x"}, "column 'chat_template_kwargs' is str 'x', expected a mapping"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        parse_row({**ASKED, **changes}, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ANSWERED, "prompt": [turn("user", "order")]}, "row 0: the row has tools, but the chat template does not"),
        ({**ASKED, "tools": None}, "row 0: the messages have tool_calls, but the chat template does not write them"),
    ],
)
def test_a_template_without_tools_is_an_error(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        texts(row, template=tiny.CHAT_TEMPLATE)
