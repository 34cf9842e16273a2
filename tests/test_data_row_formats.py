"""Every way in which datasets write preferences, and every row that is none of them."""

import re
from typing import Any

import pytest

from orpo_plugins import get_plugin_manager, hookimpl
from orpo_plugins.errors import RowError
from orpo_plugins.interfaces import Preference, RowFormat
from orpo_plugins.row_formats import common_prefix, orpo_row_formats, parse_row


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def parts(preference: Preference) -> tuple[Any, Any, Any]:
    return preference.prompt, preference.chosen, preference.rejected


CHAT = ([user("Q")], [assistant("A")], [assistant("B")])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ("Q", "A", "B")),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "score": 3, "prompt_id": "x"}, ("Q", "A", "B")),
        ({"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}, CHAT),
        ({"prompt": [user("Q")], "chosen": "A", "rejected": "B"}, CHAT),
        ({"prompt": [user("Q")], "chosen": assistant("A"), "rejected": assistant("B")}, CHAT),
        ({"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}, CHAT),
        ({"prompt": "Q", "chosen": [assistant("A")], "rejected": [assistant("B")]}, CHAT),
        (
            {"chosen": [system("S"), user("Q"), assistant("A")], "rejected": [system("S"), user("Q"), assistant("B")]},
            ([system("S"), user("Q")], [assistant("A")], [assistant("B")]),
        ),
        (
            {"system": "S", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
            ([system("S"), user("Q")], [assistant("A")], [assistant("B")]),
        ),
        ({"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"}, ([system("S"), *CHAT[0]], *CHAT[1:])),
        (
            {"system": ["S", "T"], "prompt": "Q", "chosen": "A", "rejected": "B"},
            ([system("S\nT"), *CHAT[0]], *CHAT[1:]),
        ),
        (
            {"system": [system("S")], "prompt": "Q", "chosen": "A", "rejected": "B"},
            ([system("S"), *CHAT[0]], *CHAT[1:]),
        ),
        ({"system": None, "prompt": "Q", "chosen": "A", "rejected": "B"}, CHAT),
        (
            {
                "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            ([system("S"), user("Q")], [assistant("A")], [assistant("B")]),
        ),
        ({"messages": [user("Q")], "chosen": [assistant("A")], "rejected": assistant("B")}, CHAT),
        ({"instruction": "Q", "input": "", "output": "A", "chosen": "A", "rejected": "B"}, CHAT),
        ({"instruction": "Q", "chosen": "A", "rejected": "B"}, CHAT),
        (
            {"instruction": "Q", "input": "X", "output": "A", "chosen": "A", "rejected": "B"},
            ([user("Q\nX")], [assistant("A")], [assistant("B")]),
        ),
        (
            {"instruction": "Q", "history": [["P", "O"]], "chosen": "A", "rejected": "B"},
            ([user("P"), assistant("O"), user("Q")], [assistant("A")], [assistant("B")]),
        ),
        ({"chosen": "Human: Q A", "rejected": "Human: Q B"}, ("Human: Q", " A", " B")),
    ],
)
def test_a_row_is_read(row: dict[str, Any], expected: tuple[Any, Any, Any]) -> None:
    assert parts(parse_row(row, 0)) == expected


def test_a_prompt_column_beside_whole_conversations_is_not_read_twice() -> None:
    row = {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
    assert parts(parse_row(row, 0)) == CHAT


def test_a_message_list_that_repeats_its_prompt_is_not_read_twice() -> None:
    row = {"prompt": [user("Q")], "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
    assert parts(parse_row(row, 0)) == CHAT


def test_a_prompt_column_completes_answers_that_share_a_system_message_alone() -> None:
    row = {"prompt": "Q", "chosen": [system("S"), assistant("A")], "rejected": [system("S"), assistant("B")]}
    assert parts(parse_row(row, 0)) == ([system("S"), user("Q")], [assistant("A")], [assistant("B")])


def test_where_histories_differ_the_prompt_is_what_is_shared() -> None:
    chosen = [user("Q"), assistant("A"), user("more"), assistant("C")]
    rejected = [user("Q"), assistant("B"), user("what"), assistant("D")]
    assert parts(parse_row({"chosen": chosen, "rejected": rejected}, 0)) == (chosen[:1], chosen[1:], rejected[1:])


def test_equal_conversations_keep_their_last_message_as_the_answer() -> None:
    conversation = [user("Q"), assistant("A")]
    assert parts(parse_row({"chosen": conversation, "rejected": conversation}, 0)) == (CHAT[0], CHAT[1], CHAT[1])


def test_what_arrow_fills_in_is_left_out() -> None:
    row = {
        "prompt": [{**user("Q"), "name": None}],
        "chosen": [assistant("A")],
        "rejected": [assistant("B")],
        "tools": None,
    }
    assert parts(parse_row(row, 0)) == CHAT
    assert parse_row(row, 0).template_arguments == {}


def test_tools_and_template_arguments_are_passed_on() -> None:
    row = {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
    given = {"tools": [{"name": "look_up"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert parse_row({**row, **given}, 0).template_arguments == {"tools": given["tools"], "enable_thinking": False}


def test_rows_of_strings_say_how_they_read_without_a_chat_template() -> None:
    alpaca = parse_row({"instruction": "Q", "input": "X", "chosen": "A", "rejected": "B"}, 0).plain
    assert alpaca is not None
    assert parts(alpaca) == ("### Instruction:\nQ\n\n### Input:\nX\n\n### Response:\n", "A", "B")
    with_system = parse_row({"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"}, 0).plain
    assert with_system is not None
    assert parts(with_system) == ("S\n\nQ", "A", "B")


# ---- what cannot be read

STRINGS = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**STRINGS, "chosen": None}, "row 7 (strings): column 'chosen' is None, expected a string"),
        ({**STRINGS, "prompt": 12}, "row 7 (strings): column 'prompt' is int 12, expected a string"),
        ({**STRINGS, "rejected": 0.5, "system": ""}, "row 7 (strings with system): column 'rejected' is float 0.5"),
        ({**STRINGS, "system": 5}, "row 7 (strings with system): column 'system' is int 5"),
        (
            {"prompt": "Q", "chosen": [assistant("A")], "rejected": None},
            "row 7 (conversational, implicit prompt): column 'rejected' is None, expected a list of messages",
        ),
        (
            {"chosen": [user("Q"), {"role": "assistant", "content": None}], "rejected": [user("Q"), assistant("B")]},
            "message 1 of column 'chosen' has None as its content, expected a string: keys role, content",
        ),
        (
            {"chosen": [user("Q"), {"text": "A"}], "rejected": [user("Q"), assistant("B")]},
            "message 1 of column 'chosen' has no role: its keys are text; expected role or from",
        ),
        ({"chosen": ["Q", "A"], "rejected": ["Q", "B"]}, "message 0 of column 'chosen' is str 'Q', expected a mapping"),
        ({"instruction": None, "chosen": "A", "rejected": "B"}, "row 7 (alpaca): column 'instruction' is None"),
        ("Q", "row 7: expected a mapping from column to value, got str 'Q'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        parse_row(row, 7)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"question": "Q", "chosen": "A", "rejected": "B"}, "dataset.rename_column('question', 'prompt')?"),
        ({"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}, ".rename_column('question', 'prompt')?"),
        ({"prompt": "Q", "choosen": "A", "rejected": "B"}, "dataset.rename_column('choosen', 'chosen')?"),
        ({"prompt": "Q", "chosen": "A", "Rejected": "B"}, "dataset.rename_column('Rejected', 'rejected')?"),
        (
            {"query": "Q", "response_j": "A", "response_k": "B"},
            "dataset.rename_column('query', 'prompt').rename_column('response_j', 'chosen')"
            ".rename_column('response_k', 'rejected')?",
        ),
        ({"text": "Q"}, "Missing: prompt, chosen, rejected. Rename columns, or register a row format of your own"),
        ({"prompt": "Q", "chosen": "A"}, "Missing: rejected."),
    ],
)
def test_a_missing_or_renamed_column_shows_what_was_found_and_what_is_known(row: dict[str, Any], advice: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row, 3)
    text = str(caught.value)
    assert text.startswith("row 3: no known row format fits. Columns found: ")
    assert ", ".join(f"{column} (str)" for column in row) in text
    assert advice in text
    assert all(f"{row_format.name}: {row_format.columns}" in text for row_format in orpo_row_formats())


def test_strings_without_a_prompt_have_to_begin_alike() -> None:
    with pytest.raises(RowError, match="there is no 'prompt' column, and 'chosen' and 'rejected' do not begin alike"):
        parse_row({"chosen": "A", "rejected": "B"}, 0)


def test_a_format_registered_later_is_tried_first() -> None:
    class Reversed:
        @hookimpl
        def orpo_row_formats(self) -> list[RowFormat]:
            swapped = Preference(prompt="mine", chosen="B", rejected="A")
            return [RowFormat(name="mine", columns="any", matches=lambda row: "mine" in row, parse=lambda row: swapped)]

    plugin = Reversed()
    get_plugin_manager().register(plugin)
    try:
        assert parse_row({**STRINGS, "mine": 1}, 0).prompt == "mine"
        assert parse_row(STRINGS, 0).prompt == "Q"
    finally:
        get_plugin_manager().unregister(plugin)


@pytest.mark.parametrize(
    ("texts", "shared"),
    [(("abc", "abd"), "ab"), (("", "a"), ""), (("ab", "ab"), "ab"), (("ab", "abc", "a"), "a"), (("x", "y"), "")],
)
def test_common_prefix(texts: tuple[str, ...], shared: str) -> None:
    assert common_prefix(*texts) == shared


def test_rows_with_images_are_refused() -> None:
    row = {"prompt": "What is this?", "chosen": "A cat.", "rejected": "No idea."}
    with pytest.raises(RowError, match=r"row 3: column 'images' is not empty, but only text can be trained on\. Drop"):
        parse_row({**row, "images": ["cat.png"]}, 3)
    assert parse_row({**row, "images": []}, 3).prompt == "What is this?"
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    with pytest.raises(RowError, match="holds a part of type 'image', but only text can be trained on"):
        parse_row({"prompt": parts, **answers}, 0)
