"""Tools, their calls and their answers: trained as the chat template writes them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from training import trainer

from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.data.row_formats import parse_row
from orpo_plugins.errors import RowError
from orpo_plugins.options import PairOptions

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% for message in messages %}<|{{ message.role if message.role != 'tool' else 'user' }}|>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Raises where a tool answers without having been called, and writes either a message's text or its calls.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('a tool answers without a call') }}{% endif %}<|{{ message.role }}|>"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}[{{ call.function.name }}]{% endfor %}"
    "{% else %}{{ message.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Writes what a tool answers into the turn that called it, before that turn's own text, as Gemma 4's does.
MERGED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role != 'tool' %}<|{{ message.role }}|>"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
    "{% if message.tool_calls and not loop.last %}{{ messages[loop.index].content }}{% endif %}"
    "{{ message.content }}{% if not message.tool_calls %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Opens answers with an empty reasoning block, and keeps it only behind the last question, as Qwen 3.5's does.
REASONING = (
    "{{ bos_token }}{% set last = namespace(user=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "<|{{ message.role if message.role != 'tool' else 'user' }}|>"
    "{% if message.role == 'assistant' and loop.index0 > last.user %}<none>{% endif %}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}{{ message.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|><none>{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "order", "parameters": {"properties": {"parcel": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "refund", "parameters": {"properties": {"invoice": {"type": "number"}}}}},
]


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return turn(
        "assistant", None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}]
    )


# The answers are calls; the answers follow a tool's; the answers are a call, its result and a text.
ASKED = {
    "prompt": [turn("user", "order today")],
    "chosen": [call("order", parcel="desk")],
    "rejected": [call("refund", invoice=7)],
    "tools": TOOLS,
}
ANSWERED = {
    "prompt": [turn("user", "order today"), call("order", parcel="desk"), turn("tool", "parcel later", name="order")],
    "chosen": [turn("assistant", "gladly")],
    "rejected": [turn("assistant", "never")],
    "tools": TOOLS,
}
WHOLE = {
    "prompt": [turn("user", "order today")],
    "chosen": [call("order", parcel="desk"), turn("tool", "parcel later"), turn("assistant", "gladly")],
    "rejected": [call("refund", invoice=7), turn("tool", "never"), turn("assistant", "sorry")],
    "tools": TOOLS,
}


def texts(row: dict[str, Any], side: str = "chosen", template: str = TEMPLATE, **options: Any) -> tuple[str, str]:
    """(all of the text, what is labelled of it)."""
    tokenizer = tiny.tokenizer(template)
    dataset, _ = prepare_dataset([row], tokenizer, PairOptions(max_length=None, **options))
    labels = [label for label in dataset[0][f"{side}_labels"] if label != -100]
    return tokenizer.decode(dataset[0][f"{side}_input_ids"]), tokenizer.decode(labels)


def templated(row: dict[str, Any], side: str, template: str = TEMPLATE) -> str:
    messages = [{**message, "content": message["content"] or ""} for message in [*row["prompt"], *row[side]]]
    return str(tiny.tokenizer(template).apply_chat_template(messages, tools=row.get("tools"), tokenize=False))


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
        ({"tools": "order"}, "row 4 (conversational): column 'tools' is str 'order', which is no JSON"),
        ({"tools": 3}, "column 'tools' is int 3, expected a list of JSON schemas, or the JSON text of one"),
        ({"tools": '{"a": 1}'}, "column 'tools' is str '{\"a\": 1}', expected a list of JSON schemas"),
        (
            {"prompt": [turn("user", "order"), {"from": "function_call", "value": "order()"}]},
            "message 1 of column 'prompt' is str 'order()', which is no JSON",
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
        ({**ASKED, "tools": None}, "row 0: the messages hold tool_calls, but the chat template does not write them"),
    ],
)
def test_a_template_without_tools_is_an_error(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        texts(row, template=tiny.CHAT_TEMPLATE)
