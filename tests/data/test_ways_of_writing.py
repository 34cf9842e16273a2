"""However a dataset writes a conversation and its two answers, the same pair is read."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_plugins.data.row_formats import parse_row

Message = dict[str, Any]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}

words = st.sampled_from(["where is my parcel", "and then", "it will reach you", "no idea", "12", "hello", "{}", "[a]"])
systems = st.one_of(st.none(), words)
histories = st.lists(st.tuples(words, words), max_size=2)
answers = st.tuples(words, words).filter(lambda both: both[0] != both[1])


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def said(prompt: Any) -> list[tuple[str, str]]:
    """What is said in messages, by whom; not how it is written."""
    return [(m["role"], m["content"].strip()) for m in prompt]


def as_sharegpt(messages: list[Message]) -> list[Message]:
    return [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in messages]


def with_space(messages: list[Message]) -> list[Message]:
    return [{**m, "content": f"{m['content']}\n"} for m in messages]


def with_keys(messages: list[Message]) -> list[Message]:
    return [{**m, "message_id": number, "name": None} for number, m in enumerate(messages)]


def as_json(messages: list[Message]) -> str:
    return json.dumps(messages)


def as_repr(messages: list[Message]) -> str:
    return str(messages)


def unchanged(messages: list[Message]) -> list[Message]:
    return messages


styles = st.sampled_from([unchanged, as_sharegpt, with_space, with_keys, as_json, as_repr])


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(
    system=systems,
    history=histories,
    question=words,
    both=answers,
    column=st.sampled_from([None, "prompt", "messages", "conversations"]),
    beside=st.sampled_from(["prompt", "last question", "chosen conversation", "rejected conversation"]),
    wholes=st.tuples(st.booleans(), st.booleans()),
    texts=st.tuples(st.booleans(), st.booleans()),
    systems_at=st.sets(st.sampled_from(["column", "chosen", "rejected"]), min_size=1),
    how=st.tuples(styles, styles, styles),
)
def test_every_way_of_writing_a_row_reads_the_same(
    system: str | None,
    history: list[tuple[str, str]],
    question: str,
    both: tuple[str, str],
    column: str | None,
    beside: str,
    wholes: tuple[bool, bool],
    texts: tuple[bool, bool],
    systems_at: set[str],
    how: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
) -> None:
    opening = [] if system is None else [message("system", system)]
    turns = [m for q, a in history for m in (message("user", q), message("assistant", a))] + [message("user", question)]
    chosen, rejected = ([message("assistant", text)] for text in both)
    if column is None and not all(wholes):
        return  # nobody says what the question is, or one side does (tested by itself)
    if beside == "last question" and not (column and all(wholes)):
        return  # then the history would be nowhere
    if beside == "last question" and history and history[0][0] == question:
        return  # the first question might be meant
    present = {"column": column is not None, "chosen": wholes[0], "rejected": wholes[1]}
    if opening and not any(present[place] for place in systems_at):
        return  # then the system message would be nowhere
    row: dict[str, Any] = {"score": 1.0}
    for name, answer, whole, text, style in zip(
        ("chosen", "rejected"), (chosen, rejected), wholes, texts, how, strict=False
    ):
        before = (opening if name in systems_at else []) + turns if whole else []
        row[name] = answer[0]["content"] if text and not whole else style(before + answer)
    if column:
        held = {
            "prompt": turns,
            "last question": turns[-1:],
            "chosen conversation": turns + chosen,
            "rejected conversation": turns + rejected,
        }[beside]
        row[column] = how[2]((opening if "column" in systems_at else []) + held)
    read = parse_row(row, 0)
    assert not isinstance(read.prompt, str)
    assert not isinstance(read.chosen, str)
    assert not isinstance(read.rejected, str)
    assert read.rejected is not None
    assert said(read.prompt) == said(opening + turns)
    assert said(read.chosen) == said(chosen)
    assert said(read.rejected) == said(rejected)
