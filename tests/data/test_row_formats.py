"""Every way in which datasets write preferences, and every row that is none of them."""

import json
import re
from typing import Any

import pytest

from orpo_plugins import get_plugin_manager, hookimpl
from orpo_plugins.data.conversations import common_prefix
from orpo_plugins.data.row_formats import orpo_row_formats, parse_row
from orpo_plugins.errors import RowError
from orpo_plugins.hooks.types import Preference, RowFormat


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
        (
            {"instruction": "Q", "history": json.dumps([["P", "O"]]), "chosen": "A", "rejected": "B"},
            ([user("P"), assistant("O"), user("Q")], [assistant("A")], [assistant("B")]),
        ),
        (
            {"query": "Q", "history": [user("P"), assistant("O")], "response": "A", "rejected_response": "B"},
            ([user("P"), assistant("O"), user("Q")], [assistant("A")], [assistant("B")]),
        ),
        ({"instruction": "Q", "history": "", "chosen": "A", "rejected": "B"}, CHAT),
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


WHOLE = {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
ANSWERS = {"chosen": [assistant("A")], "rejected": [assistant("B")]}
STRING_ANSWERS = {"chosen": "A", "rejected": "B"}


@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
@pytest.mark.parametrize("answers", [WHOLE, ANSWERS, STRING_ANSWERS], ids=["whole", "answers", "strings"])
@pytest.mark.parametrize("end", [[], [assistant("A")], [assistant("B ")]], ids=["no answer", "chosen", "rejected"])
def test_a_conversation_beside_the_answers_is_read_once_whatever_both_hold(
    column: str, answers: dict[str, Any], end: list[Any]
) -> None:
    assert parts(parse_row({column: [user("Q"), *end], **answers}, 0)) == CHAT


@pytest.mark.parametrize(
    "prompt",
    [
        [user("Q ")],
        [user("\nQ")],
        [{**user("Q"), "message_id": "7", "weight": 1}],
        [user([{"type": "text", "text": "Q"}])],  # type: ignore[arg-type]
    ],
    ids=["space", "newline", "more keys", "content in parts"],
)
@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_question_that_differs_in_nothing_that_is_said_stands_once(column: str, prompt: list[Any]) -> None:
    assert parts(parse_row({column: prompt, **WHOLE}, 0)) == (prompt, *CHAT[1:])


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_a_system_message_may_stand_at_one_place_alone(where: str) -> None:
    row = {"prompt": [user("Q")], **WHOLE}
    expected = ([system("S"), user("Q")], *CHAT[1:])
    assert parts(parse_row({**row, where: [system("S"), *row[where]]}, 0)) == expected
    if where != "prompt":
        assert parts(parse_row({**WHOLE, where: [system("S"), *WHOLE[where]]}, 0)) == expected


def test_two_system_messages_are_refused() -> None:
    row = {"chosen": [system("S"), *WHOLE["chosen"]], "rejected": [system("T"), *WHOLE["rejected"]]}
    with pytest.raises(RowError, match="two system messages, 'S' and 'T', and both answers need the same prompt. Keep"):
        parse_row(row, 0)


def test_the_last_question_of_a_conversation_may_stand_beside_it() -> None:
    earlier = [user("P"), assistant("O")]
    row = {name: [*earlier, *messages] for name, messages in WHOLE.items()}
    expected = ([*earlier, user("Q")], *CHAT[1:])
    assert parts(parse_row({"prompt": [user("Q")], **row}, 0)) == expected
    assert parts(parse_row({"prompt": [*earlier, user("Q")], **row}, 0)) == expected


def test_one_answer_may_hold_the_whole_conversation() -> None:
    for row in (
        {**WHOLE, "rejected": "B"},
        {**WHOLE, "chosen": assistant("A")},
        {**WHOLE, "chosen": ANSWERS["chosen"]},
    ):
        assert parts(parse_row(row, 0)) == CHAT
        assert parts(parse_row({"prompt": [user("Q")], **row}, 0)) == CHAT


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_another_conversation_beside_whole_ones_is_refused(column: str) -> None:
    message = (
        f"row 3 \\(.*\\): column '{column}' \\('P'\\) and the conversations in 'chosen' and 'rejected' \\('Q'\\) "
        f"do not fit together. Make them agree, or leave column '{column}' out"
    )
    row = {column: [user("P")], **WHOLE}
    with pytest.raises(RowError, match=message):
        parse_row(row, 3)
    del row[column]  # the advice
    assert parts(parse_row(row, 3)) == CHAT


def test_a_conversation_that_ends_with_a_third_answer_is_refused_beside_two_answers() -> None:
    row = {"messages": [user("Q"), assistant("C")], **STRING_ANSWERS}
    message = r"ends with an assistant's message \('C'\) that is neither the chosen nor the rejected.*Remove it"
    with pytest.raises(RowError, match=message):
        parse_row(row, 0)
    assert parts(parse_row({"messages": [user("Q"), assistant("C")], **WHOLE}, 0)) == CHAT  # which hold the question


@pytest.mark.parametrize("name", ["prompt", "instruction"])
def test_a_string_beside_message_lists_is_their_question(name: str) -> None:
    assert parts(parse_row({name: "Q", **ANSWERS}, 0)) == CHAT
    assert parts(parse_row({name: "Q", **WHOLE}, 0)) == CHAT
    assert parts(parse_row({name: "another name of it", **WHOLE}, 0)) == CHAT


def test_answers_without_any_question_are_refused_and_the_advice_works() -> None:
    row = {"question": "Q", **ANSWERS}
    with pytest.raises(RowError, match=r"of an assistant alone, and no question. Did you mean .*'question', 'prompt'"):
        parse_row(row, 0)
    assert parts(parse_row({"prompt": row.pop("question"), **row}, 0)) == CHAT


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Q"), assistant("A")], "rejected_response": "B"},
        {"messages": [user("Q"), assistant("A")], "rejected_messages": [user("Q"), assistant("B")]},
        {"query": "Q", "response": "A", "rejected_response": "B"},
    ],
    ids=lambda row: "+".join(row),
)
def test_rows_of_ms_swift(row: dict[str, Any]) -> None:
    assert parts(parse_row(row, 0)) == CHAT
    assert parse_row({**row, "tools": [{"name": "f"}]}, 0).template_arguments == {"tools": [{"name": "f"}]}


def test_a_row_of_ms_swift_without_an_answer_is_refused() -> None:
    with pytest.raises(
        RowError, match=r"row 2 \(ms-swift\): column 'messages' does not end with an assistant's message"
    ):
        parse_row({"messages": [user("Q")], "rejected_response": "B"}, 2)


@pytest.mark.parametrize(
    "write", [json.dumps, str, lambda value: json.dumps(value, indent=1)], ids=["json", "repr", "indent"]
)
@pytest.mark.parametrize(
    "row", [{"prompt": "Q", **WHOLE}, {"prompt": [user("Q")], **ANSWERS}, {"messages": [user("Q")], **ANSWERS}, WHOLE]
)
def test_message_lists_written_as_text_are_read(row: dict[str, Any], write: Any) -> None:
    written = {name: value if isinstance(value, str) else write(value) for name, value in row.items()}
    assert parts(parse_row(written, 0)) == CHAT
    sharegpt = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert parts(parse_row({**written, "chosen": write(sharegpt), "prompt": "Q"}, 0))[1] == CHAT[1]


def twice(value: Any) -> str:
    return json.dumps(json.dumps(value))


def in_a_mapping(value: Any) -> str:
    return json.dumps({"messages": value})


def with_a_mark(value: Any) -> str:
    return "\ufeff" + json.dumps(value)


def with_keys_first(value: Any) -> str:
    return str(tuple({"id": 1, "weight": 0.5, **message} for message in value))


@pytest.mark.parametrize("write", [twice, in_a_mapping, with_a_mark, with_keys_first])
def test_message_lists_in_other_writings_are_read(write: Any) -> None:
    row = parse_row({"prompt": "Q", **{name: write(messages) for name, messages in WHOLE.items()}}, 0)
    assert [[message["content"] for message in part] for part in parts(row)] == [["Q"], ["A"], ["B"]]


def test_message_lists_written_into_other_columns() -> None:
    written = {"messages": [user("Q"), assistant("A")], "rejected_response": json.dumps([assistant("B")])}
    assert parts(parse_row(written, 0)) == CHAT
    with pytest.raises(RowError, match="column 'instruction' is list .* Message lists belong in"):
        parse_row({"instruction": json.dumps([user("Q")]), **STRING_ANSWERS}, 0)
    row = {"system": json.dumps([system("S")]), "prompt": "Q", **STRING_ANSWERS}
    assert parse_row(row, 0).prompt == [system("S"), user("Q")]


@pytest.mark.parametrize("form", ["array([%s], dtype=object)", "[%s, OrderedDict()]"])
def test_message_lists_as_pandas_prints_them_are_refused(form: str) -> None:
    row = {"prompt": "Q", "chosen": form % WHOLE["chosen"][0], "rejected": "B"}
    with pytest.raises(RowError, match="column 'chosen' is the text of a list of messages"):
        parse_row(row, 0)


def test_message_lists_as_numpy_prints_them_are_refused() -> None:
    text = "[{'role': 'user', 'content': 'Q'}\n {'role': 'assistant', 'content': 'A'}]"
    with pytest.raises(
        RowError, match="row 4: column 'chosen' is the text of a list of messages .* Write the lists as"
    ):
        parse_row({"prompt": "Q", "chosen": text, "rejected": "B"}, 4)


@pytest.mark.parametrize(
    "answer", ['{"content": "A"}', '[{"value": 3}]', "{'role' is a word", '["A", "B"]', "{}", "[{}]"]
)
def test_answers_in_json_are_answers(answer: str) -> None:
    assert parts(parse_row({"prompt": "Q", "chosen": answer, "rejected": "B"}, 0)) == ("Q", answer, "B")


def test_arrays_of_numpy_are_lists() -> None:
    numpy = pytest.importorskip("numpy")
    row = {name: numpy.array(messages, dtype=object) for name, messages in WHOLE.items()}
    assert parts(parse_row({**row, "score": numpy.float32(1)}, 0)) == CHAT
    inner = {"role": "user", "content": numpy.array([{"type": "text", "text": "Q"}], dtype=object)}
    assert parse_row({"prompt": [inner], **ANSWERS}, 0).prompt == [user([{"type": "text", "text": "Q"}])]  # type: ignore[arg-type]


def test_nan_is_nothing() -> None:
    nan = float("nan")
    empty = dict.fromkeys(("system", "input", "history", "tools", "chat_template_kwargs", "images"), nan)
    assert parts(parse_row({"instruction": "Q", **STRING_ANSWERS, **empty}, 0)) == CHAT
    assert parts(parse_row({"prompt": "Q", **STRING_ANSWERS, **empty}, 0)) == CHAT


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("human", "user"),
        ("prompter", "user"),
        ("Human", "user"),
        ("ai", "assistant"),
        ("AI", "assistant"),
        ("Assistant", "assistant"),
        ("observation", "tool"),
        ("ipython", "ipython"),
    ],
)
def test_roles_have_several_names(role: str, known: str) -> None:
    row = {"prompt": [user("P"), {"role": role, "content": "Q"}], **ANSWERS}
    assert parse_row(row, 0).prompt[-1]["role"] == known  # type: ignore[index]


@pytest.mark.parametrize("row", [{"prompt": [user("Q")]}, {"messages": [user("Q")]}, {"prompt": "Q"}, {}])
@pytest.mark.parametrize("role", ["user", "narrator"])
def test_an_answer_without_an_assistant_is_refused_with_its_roles(row: dict[str, Any], role: str) -> None:
    answer = {"role": role, "content": "B"}
    rejected = [answer] if role == "narrator" and row else [user("Q"), answer]
    chosen = ANSWERS["chosen"] if len(rejected) == 1 else WHOLE["chosen"]
    with pytest.raises(RowError) as caught:
        parse_row({**row, "chosen": chosen, "rejected": rejected}, 5)
    assert "row 5 (" in str(caught.value)
    assert f"the rejected answer has no message of an assistant: message 0 has the role {role!r}" in str(caught.value)
    assert "human, prompter, gpt, chatgpt, ai, bot" in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "half \ud83d"},
        {"prompt": [user("Q")], "chosen": "A", "rejected": [assistant("half \ud83d")]},
        {"chosen": WHOLE["chosen"], "rejected": [user("Q"), assistant([{"type": "text", "text": "half \ud83d"}])]},  # type: ignore[arg-type]
        {"instruction": "Q", "chosen": "A", "rejected": "half \ud83d"},
    ],
)
def test_half_a_surrogate_pair_is_named_and_the_repair_works(row: dict[str, Any]) -> None:
    with pytest.raises(
        RowError, match=r"row 6 .*column 'rejected' contains '\\ud83d' at position 5, half of a surrogate pair"
    ):
        parse_row(row, 6)
    assert "half \ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace") == "half \ufffd"


@pytest.mark.parametrize("name", ["prompt", "instruction"])
def test_a_string_stands_before_answers_that_begin_with_the_same_turns(name: str) -> None:
    shared = [assistant("hi"), user("Q")]
    row = {name: "hello", "chosen": [*shared, assistant("A")], "rejected": [*shared, assistant("B")]}
    expected = ([user("hello"), *shared], [assistant("A")], [assistant("B")])
    assert parts(parse_row(row, 0)) == expected
    assert parts(parse_row({**row, name: None, "prompt": [user("hello")]}, 0)) == expected


def test_a_prompt_with_a_question_more_than_whole_conversations_is_refused() -> None:
    context = [user("hello"), assistant("hi"), user("Q")]
    row = {"chosen": [user("hello"), assistant("A")], "rejected": [user("hello"), assistant("B")]}
    for column in ("prompt", "messages"):
        with pytest.raises(RowError, match="do not fit together"):
            parse_row({column: context, **row}, 0)


def test_answers_may_repeat_the_last_question_of_a_longer_prompt() -> None:
    context = [user("hello"), assistant("hi"), user("Q")]
    assert parts(parse_row({"prompt": context, **WHOLE}, 0)) == (context, *CHAT[1:])


def test_an_empty_system_message_is_none() -> None:
    row = {"chosen": [system(" "), *WHOLE["chosen"]], "rejected": [system("S"), *WHOLE["rejected"]]}
    assert parts(parse_row(row, 0)) == ([system("S"), user("Q")], *CHAT[1:])


def test_a_history_beside_a_prompt_of_strings_comes_first() -> None:
    row = {"history": [["P", "O"]], "prompt": "Q", "chosen": "A", "rejected": "B"}
    assert parts(parse_row(row, 0)) == ([user("P"), assistant("O"), user("Q")], *CHAT[1:])
    assert parts(parse_row({**row, "system": "S"}, 0))[0] == [system("S"), user("P"), assistant("O"), user("Q")]
    assert parse_row({**row, "history": []}, 0).prompt == "Q"


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
        (
            {"instruction": "Q", "history": [["P"]], "chosen": "A", "rejected": "B"},
            "row 7 (alpaca): column 'history' is list [['P']], expected a list of [question, answer] pairs, or",
        ),
        (
            {"instruction": "Q", "history": "P", "chosen": "A", "rejected": "B"},
            "column 'history' is str 'P', which is not",
        ),
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


@pytest.mark.parametrize("value", [12, 0.5, True])
def test_the_advice_for_a_value_that_is_no_string_works(value: Any) -> None:
    row = {**STRINGS, "prompt": value}
    advice = "Make it a string (dataset.cast_column('prompt', datasets.Value('string')), or str(...) where rows are"
    with pytest.raises(RowError, match=re.escape(advice)):
        parse_row(row, 0)
    assert parts(parse_row({**row, "prompt": str(value)}, 0)) == (str(value), "A", "B")
    datasets = pytest.importorskip("datasets")
    (cast,) = datasets.Dataset.from_list([row]).cast_column("prompt", datasets.Value("string"))
    assert parse_row(cast, 0).prompt in (str(value), str(value).lower())


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_value_that_is_missing_is_not_to_be_made_a_string(value: Any, column: str) -> None:
    with pytest.raises(
        RowError, match=rf"column '{column}' is .*, expected a string. Fill it in, or filter the row out"
    ):
        parse_row({**STRINGS, column: value}, 0)


ALIKE = {"chosen": "Step 1: add. 4", "rejected": "Step 1: add. 5"}


@pytest.mark.parametrize("column", ["trajectory", "text", "article", "Frage", "task"])
@pytest.mark.parametrize("answers", [ALIKE, STRING_ANSWERS], ids=["alike", "different"])
def test_a_prompt_in_a_column_that_nobody_knows_is_named(column: str, answers: dict[str, str]) -> None:
    row = {column: "find the sum", "id": "a b c", "source": "a web page", "chosen_model": "m 1", **answers}
    with pytest.raises(RowError) as caught:
        parse_row(row, 1)
    assert "there is no 'prompt' column" in str(caught.value)
    assert f"Did you mean dataset.rename_column('{column}', 'prompt')?" in str(caught.value)
    row["prompt"] = row.pop(column)
    assert parse_row(row, 1).prompt == "find the sum"


@pytest.mark.parametrize(
    ("column", "value"),
    [("info", {"prompt": "Q"}), ("turns", ["Q"]), ("topic", "Q"), ("task", "Q"), ("chosen_prompt", "Q")],
)
@pytest.mark.parametrize("opening", ["Step 1: add. ", "Answer: the sum is ", "Question: sum? It is "])
def test_words_that_answers_share_are_no_prompt_beside_another_text(column: str, value: Any, opening: str) -> None:
    with pytest.raises(RowError, match=rf"by chance \(.*\), and '{column}' would not be read"):
        parse_row({column: value, "chosen": f"{opening}4", "rejected": f"{opening}5"}, 0)


def test_a_system_column_stands_before_an_implicit_prompt() -> None:
    row = {"system": "S", "chosen": "Human: Q\nAssistant: A", "rejected": "Human: Q\nAssistant: B"}
    assert parse_row(row, 0).prompt == "S\n\nHuman: Q\nAssistant:"


def test_a_text_that_ends_where_its_answer_would_begin_has_an_empty_answer() -> None:
    row = {"chosen": "Human: Q\n\nAssistant: A", "rejected": "Human: Q\n\nAssistant:"}
    assert parts(parse_row(row, 0)) == ("Human: Q\n\nAssistant:", " A", "")


def test_the_advice_for_a_column_that_holds_no_prompt_works() -> None:
    row = {"remark": "seen twice", **ALIKE}
    with pytest.raises(RowError, match=re.escape("'remark' would not be read")) as caught:
        parse_row(row, 1)
    assert "If the prompt is in the answers: dataset.remove_columns(['remark'])" in str(caught.value)
    assert parts(parse_row(ALIKE, 1)) == ("Step 1: add.", " 4", " 5")


@pytest.mark.parametrize(
    "history",
    ["\n\nHuman: Q\n\nAssistant:", "### Question: Q\n### Response:", "[INST] Q [/INST]", "<|user|>Q<|assistant|>"],
)
def test_texts_with_turns_hold_their_prompt_whatever_stands_beside_them(history: str) -> None:
    row = {"remark": "seen twice", "chosen": f"{history} gladly", "rejected": f"{history} never"}
    assert parts(parse_row(row, 0)) == (history, " gladly", " never")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("the sky is blue", "the sky is black", ("the sky is", " blue", " black")),
        ("take 12 parcels", "take 13 parcels", ("take", " 12 parcels", " 13 parcels")),
        ("ask the desk", "ask the desks", ("ask the", " desk", " desks")),
        ("the sky. Blue", "the sky. It is", ("the sky.", " Blue", " It is")),
        ("問: 天気\n答: 晴れ", "問: 天気\n答: 大雨", ("問: 天気\n答:", " 晴れ", " 大雨")),
        ("今日は晴れ", "今日は大雨", ("今日は", "晴れ", "大雨")),
        ("yes, it is", "yes, it isn't", ("yes, it", " is", " isn't")),
    ],
)
def test_an_implicit_prompt_ends_at_a_word(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    assert parts(parse_row({"chosen": chosen, "rejected": rejected}, 0)) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("I can", "I cannot"), ("refund", "refuse"), ("- yes", "- no"), ("12", "13")]
)
def test_answers_that_share_no_word_have_no_prompt(chosen: str, rejected: str) -> None:
    with pytest.raises(RowError, match="there is no 'prompt' column, and 'chosen' and 'rejected' do not begin with"):
        parse_row({"chosen": chosen, "rejected": rejected}, 0)


@pytest.mark.parametrize(
    "row",
    [
        {"question": 5, "chosen": "A", "rejected": "B"},
        {"question": "Q", "answer": "A", "rejected": None},
        {"messages": [user("Q")], "answer": "A"},
    ],
)
def test_no_rename_is_advised_after_which_the_row_would_be_refused(row: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row, 0)
    assert "rename_column" not in str(caught.value)
    assert "Missing: " in str(caught.value)


def test_strings_without_a_prompt_have_to_begin_alike() -> None:
    with pytest.raises(RowError, match="there is no 'prompt' column, and 'chosen' and 'rejected' do not begin with"):
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
    with pytest.raises(RowError, match="has a part of type 'image', but only text can be trained on"):
        parse_row({"prompt": parts, **answers}, 0)
