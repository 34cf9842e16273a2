"""Row formats: how datasets write a prompt, a chosen and a rejected answer.

Each format reads a row into a `Preference`: three strings, or three message lists.  The columns of a row, and whether
their values are text or messages, decide which format reads it.  A value of the wrong type is then an error of that
format, which names the column.  So one bad row in a good dataset is not reported as an unknown format.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orpo_plugins.data.conversations import count_turns, end_of_shared_words, is_whole, question_and_answers, turns_of
from orpo_plugins.data.row_values import (
    CALL,
    CONVERSATIONS,
    MEDIA,
    ROLES,
    TEXT_ONLY,
    Row,
    assistant,
    history_of,
    kind,
    message_lists_in_texts,
    messages_of,
    plain_value,
    shortened,
    system_text,
    text_of,
    tool_schemas,
    user,
    without_none,
)
from orpo_plugins.errors import PluginError, RowError
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Message, Preference, RowFormat

_IMPLICIT_STRINGS = "strings, implicit prompt"

_OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "context", "post", "user", "human"),
    "chosen": ("accepted", "preferred", "good", "better", "positive", "response_j", "chosen_response", "answer"),
    "rejected": ("dispreferred", "bad", "worse", "negative", "response_k", "rejected_response"),
}
"""Other names that datasets give to the three columns."""

_NO_PROMPT = re.compile(
    r"(^|_)(id|ids|idx|index|source|origin|dataset|subset|split|models?|generator|category|categories|type|kind"
    r"|domain|tags?|key|name|lang|language|labels?|score|scores|rating|difficulty|url|uuid|hash|date|time"
    r"|timestamp|license|version|system|tools|chat_template_kwargs|weight|margin)$|^(chosen|rejected)_",
    re.IGNORECASE,
)
"""Names of columns that describe a row or an answer, and do not contain a prompt."""


@hookimpl
def orpo_row_formats() -> list[RowFormat]:
    """The built-in formats.  The first that matches reads the row."""
    return [
        RowFormat(
            name="ms-swift",
            columns="messages (that end with the chosen answer), rejected_response or rejected_messages; or query, "
            "response, rejected_response (strings)",
            matches=lambda row: not _has(row, "rejected") and (_is_swift(row) or _is_swift_strings(row)),
            parse=lambda row: _parse_swift(row) if _is_swift(row) else _parse_swift_strings(row),
        ),
        RowFormat(
            name="conversational",
            columns="prompt, chosen, rejected (message lists)",
            matches=lambda row: _has(row, "prompt", "chosen", "rejected") and _is_messages(row["prompt"]),
            parse=lambda row: _chat(row, *_parts(row, "prompt", messages_of(row, "prompt"))),
        ),
        RowFormat(
            name="sharegpt",
            columns="conversations (or messages), chosen, rejected (messages with from/value or role/content)",
            matches=lambda row: _conversation_column(row) is not None and _has(row, "chosen", "rejected"),
            parse=_parse_sharegpt,
        ),
        RowFormat(
            name="conversational, implicit prompt",
            columns="chosen, rejected (message lists that begin with the same messages)",
            matches=lambda row: (
                _has(row, "chosen", "rejected") and (_is_messages(row["chosen"]) or _is_messages(row["rejected"]))
            ),
            parse=_parse_implicit,
        ),
        RowFormat(
            name="alpaca",
            columns="instruction, input (optional), chosen, rejected (strings)",
            matches=lambda row: _has(row, "instruction", "chosen", "rejected") and not _has(row, "prompt"),
            parse=_parse_alpaca,
        ),
        RowFormat(
            name="strings with system",
            columns="system, prompt, chosen, rejected (strings)",
            matches=lambda row: _has(row, "system", "prompt", "chosen", "rejected"),
            parse=_parse_system,
        ),
        RowFormat(
            name="strings",
            columns="prompt, chosen, rejected (strings)",
            matches=lambda row: _has(row, "prompt", "chosen", "rejected"),
            parse=_parse_strings,
        ),
        RowFormat(
            name=_IMPLICIT_STRINGS,
            columns="chosen, rejected (strings that begin with the same words)",
            # If the prompt has a column under another name, the error must say so.
            matches=lambda row: _has(row, "chosen", "rejected") and _renamed(row, "prompt") is None,
            parse=_parse_implicit_strings,
        ),
    ]


def parse_row(row: Row, index: int | str, *, sft_rows: bool = False, template_strings: bool = False) -> Preference:
    """Reads a row with the first format of `plugins.row_formats()` that matches.

    Args:
        row: from column name to value.
        index: the row's number, or any other name of it, for error messages.
        sft_rows: whether a row may have no rejected answer (no such column, or None in it).
        template_strings: whether a row of strings becomes a conversation, if its prompt has a column of its own.

    Raises:
        RowError: no format matches (the message lists the columns found and the known formats), or a value does not
            fit.
    """
    place = f"row {index}"
    if not isinstance(row, Mapping):
        raise RowError(f"{place}: expected a mapping from column to value, got {kind(row)}")
    row = {name: plain_value(value) for name, value in row.items()}
    if media := next((column for column in MEDIA if row.get(column)), None):
        raise RowError(f"{place}: column {media!r} is not empty, but only text can be trained on. {TEXT_ONLY}")
    try:
        row |= message_lists_in_texts(row)
    except RowError as error:
        raise RowError(f"{place}: {error}") from error
    chosen_only = sft_rows and row.get("rejected") is None and row.get("chosen") is not None
    if chosen_only:
        # Every format reads two answers, so the chosen one is read twice.
        row = {**row, "rejected": row["chosen"]}
    for row_format in plugins.row_formats():
        try:
            if not row_format.matches(row):
                continue
            preference = row_format.parse(row)
            if template_strings and row_format.name != _IMPLICIT_STRINGS:
                preference = _as_conversation(preference, row)
            return _without_rejected(preference, row_format) if chosen_only else preference
        except (RowError, PluginError) as error:
            raise type(error)(f"{place} ({row_format.name}): {error}") from (error.__cause__ or error)
    raise RowError(f"{place}: {_unknown_format(row)}")


def _without_rejected(preference: Preference, row_format: RowFormat) -> Preference:
    if row_format.name == _IMPLICIT_STRINGS:
        raise RowError(
            "there is no 'prompt' column and no rejected answer, so the beginning of the answer is not known. Give the "
            "row a prompt"
        )
    plain = None if preference.plain is None else replace(preference.plain, rejected=None)
    return replace(preference, rejected=None, plain=plain)


def _as_conversation(preference: Preference, row: Row) -> Preference:
    """Makes strings a user's message and an assistant's answers.  The strings stay in `plain`."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if not (isinstance(prompt, str) and isinstance(chosen, str)):
        return preference
    chat = _chat(row, user(prompt), assistant(chosen), assistant(str(rejected)), plain=preference)
    return chat if rejected is not None else replace(chat, rejected=None)


# ---- the formats


def _is_swift(row: Row) -> bool:
    return _has(row, "messages") and bool(_has(row, "rejected_response") or _has(row, "rejected_messages"))


def _is_swift_strings(row: Row) -> bool:
    return _has(row, "query", "response", "rejected_response")


def _parse_swift(row: Row) -> Preference:
    conversation = messages_of(row, "messages")
    if row.get("rejected_messages") is not None:
        return _chat(row, *question_and_answers([], conversation, messages_of(row, "rejected_messages")))
    if not conversation or conversation[-1]["role"] != "assistant":
        raise RowError(
            "column 'messages' does not end with an assistant's message, which is the chosen answer of a row with "
            "'rejected_response'. Add it, or filter the row out"
        )
    if not isinstance(row["rejected_response"], str):
        return _chat(row, *question_and_answers([], conversation, messages_of(row, "rejected_response")))
    return _chat(row, conversation[:-1], conversation[-1:], messages_of(row, "rejected_response"))


def _parse_swift_strings(row: Row) -> Preference:
    query, chosen, rejected = (text_of(row, name) for name in ("query", "response", "rejected_response"))
    return _chat(row, [*history_of(row), *user(query)], assistant(chosen), assistant(rejected))


def _conversation_column(row: Row) -> str | None:
    return next((name for name in CONVERSATIONS if isinstance(row.get(name), list | tuple) and row[name]), None)


def _parse_sharegpt(row: Row) -> Preference:
    column = str(_conversation_column(row))
    prompt, chosen, rejected = _parts(row, column, messages_of(row, column))
    if prompt and prompt[-1]["role"] == "assistant" and chosen and chosen[0]["role"] == "assistant":
        raise RowError(
            f"column {column!r} ends with an assistant's message ({shortened(prompt[-1]['content'])}) that is neither "
            f"the chosen nor the rejected answer, so both would follow another answer. Remove it from {column!r}"
        )
    return _chat(row, prompt, chosen, rejected)


def _parse_alpaca(row: Row) -> Preference:
    instruction, given = text_of(row, "instruction"), text_of(row, "input", default="")
    question = _question(row, "instruction")
    prompt = history_of(row)
    sections = [f"### Instruction:\n{instruction}\n\n"]
    if given.strip():
        sections.append(f"### Input:\n{given}\n\n")
    plain_prompt = "".join([*sections, "### Response:\n"]) if question.strip() else ""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    plain = _strings(_before(text_of(row, "system", default=""), plain_prompt), chosen, rejected)
    return _chat(row, prompt + user(question), assistant(chosen), assistant(rejected), plain=None if prompt else plain)


def _parse_implicit(row: Row) -> Preference:
    prompt, chosen, rejected = question_and_answers([], messages_of(row, "chosen"), messages_of(row, "rejected"))
    opening = turns_of(prompt)
    if opening and is_whole(opening):
        return _chat(row, prompt, chosen, rejected)  # the answers contain the question; a prompt column repeats it
    column = next((name for name in ("prompt", "instruction") if isinstance(row.get(name), str)), None)
    if column is not None:
        return _chat(row, *_parts(row, column, [*history_of(row), *user(_question(row, column))]))
    if not prompt and chosen and rejected and not any(map(is_whole, (chosen, rejected))):
        raise RowError(f"'chosen' and 'rejected' have messages of an assistant alone, and no question. {_advice(row)}")
    return _chat(row, prompt, chosen, rejected)


def _parse_strings(row: Row) -> Preference:
    prompt, chosen, rejected = text_of(row, "prompt"), text_of(row, "chosen"), text_of(row, "rejected")
    history = history_of(row)
    if not history:
        return _strings(prompt, chosen, rejected)
    return _chat(row, [*history, *user(prompt)], assistant(chosen), assistant(rejected))


def _parse_system(row: Row) -> Preference:
    prompt, chosen, rejected = text_of(row, "prompt"), text_of(row, "chosen"), text_of(row, "rejected")
    history = history_of(row)
    plain = None if history else _strings(_before(system_text(row["system"]), prompt), chosen, rejected)
    return _chat(row, [*history, *user(prompt)], assistant(chosen), assistant(rejected), plain=plain)


def _question(row: Row, column: str) -> str:
    """The text of a prompt column.  For Alpaca's `instruction`, the text of `input` follows on a new line."""
    given = text_of(row, "input", default="") if column == "instruction" else ""
    return f"{text_of(row, column)}\n{given}" if given.strip() else text_of(row, column)


def _parse_implicit_strings(row: Row) -> Preference:
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    shared = chosen[: end_of_shared_words(chosen, rejected)]
    if chosen != rejected:
        _check_implicit_prompt(row, shared)
    prompt = _before(system_text(row.get("system")), shared)
    return _strings(prompt, chosen[len(shared) :], rejected[len(shared) :])


def _check_implicit_prompt(row: Row, shared: str) -> None:
    """Raises `RowError` if the common beginning of two strings is probably no prompt, but a coincidence."""
    if not re.search(r"\w\w", shared):
        raise RowError(
            f"there is no 'prompt' column, and 'chosen' and 'rejected' do not begin with the same words. {_advice(row)}"
        )
    unused = _unused_texts(row)
    if unused and count_turns(shared) < 2:  # fewer than two turns: of a question and of an answer
        raise RowError(
            f"there is no 'prompt' column, 'chosen' and 'rejected' may begin with the same words by chance "
            f"({shortened(shared)}), and {' and '.join(map(repr, unused))} would not be read. {_advice(row)} If the "
            f"prompt is in the answers: dataset.remove_columns({unused!r})"
        )


def _unused_texts(row: Row) -> list[str]:
    """Columns with text or messages whose names do not rule out a prompt."""
    known = {"chosen", "rejected"}
    return [
        str(name)
        for name, value in row.items()
        if name not in known and not _is_no_prompt(str(name)) and _has_text(value)
    ]


def _is_no_prompt(name: str) -> bool:
    question = re.search("prompt|question|query|instruction", name, re.IGNORECASE)
    return question is None and _NO_PROMPT.search(name) is not None


def _has_text(value: Any) -> bool:
    """Whether a value is text, or a list or mapping with text in it."""
    if isinstance(value, Mapping):
        return any(map(_has_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_text, value))
    return isinstance(value, str) and bool(value.strip())


def _parts(row: Row, column: str, context: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers of a row with the prompt in `column`.  The answers may contain it again."""
    return question_and_answers(context, messages_of(row, "chosen"), messages_of(row, "rejected"), column=column)


# ---- values


def _strings(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def _chat(
    row: Row,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    *,
    plain: Preference | None = None,
) -> Preference:
    """A preference of message lists, with the columns `system`, `tools` and `chat_template_kwargs` of the row."""
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer and not any(message["role"] == "assistant" for message in answer):
            roles = ", ".join(f"message {number} has the role {m['role']!r}" for number, m in enumerate(answer))
            raise RowError(
                f"the {name} answer has no message of an assistant: {roles}. Known roles (several are names for an "
                f"assistant): {', '.join(ROLES)}, {CALL}"
            )
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise RowError(f"column 'chat_template_kwargs' is {kind(given)}, expected a mapping")
    arguments: dict[str, Any] = without_none(given)
    if tools := tool_schemas(row.get("tools")):
        arguments["tools"] = tools
    system = system_text(row.get("system"))
    if system.strip() and prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, template_arguments=arguments, plain=plain)


def _before(system: str, prompt: str) -> str:
    return f"{system}\n\n{prompt}" if system.strip() and prompt.strip() and system not in prompt else prompt


def _has(row: Row, *columns: str) -> bool:
    return all(column in row for column in columns)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping)


# ---- the error for a row that no format reads


def _unknown_format(row: Row) -> str:
    found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "none"
    known = "".join(f"\n  {row_format.name}: {row_format.columns}" for row_format in plugins.row_formats())
    return f"no known row format fits. Columns found: {found}. {_advice(row)}\nKnown formats:{known}"


def _advice(row: Row) -> str:
    """The remedy for a row that cannot be read: columns to rename, or else the columns that are missing."""
    renames = likely_renames(row)
    if renames and _is_readable({dict(renames).get(name, name): value for name, value in row.items()}):
        calls = "".join(f".rename_column({old!r}, {name!r})" for old, name in renames)
        return f"Did you mean dataset{calls}?"
    missing = [name for name in _OTHER_NAMES if name not in row]
    return f"Missing: {', '.join(missing)}. Rename columns, or register a row format of your own (docs/plugins.md)."


def likely_renames(row: Row) -> list[tuple[str, str]]:
    """For each missing column of prompt, chosen and rejected: (the column that is probably meant, the missing name)."""
    found = {name: _renamed(row, name) for name in _OTHER_NAMES}
    if found["prompt"] is None and not _has(row, "prompt") and _conversation_column(row) is None:
        unused = [name for name in _unused_texts(row) if name not in found.values()]
        found["prompt"] = unused[0] if unused and _has(row, "chosen", "rejected") else None
    return [(old, name) for name, old in found.items() if old is not None]


def _is_readable(row: Row) -> bool:
    try:
        parse_row(row, 0)
    except RowError:
        return False
    return True


def _renamed(row: Row, column: str) -> str | None:
    """The column that is probably `column` under another name; None if `column` is there, or none looks like it."""
    if column in row:
        return None
    names = {str(name).lower().strip(): str(name) for name in row if name not in _OTHER_NAMES}
    known = [name for name in _OTHER_NAMES[column] if name in names]
    similar = known or difflib.get_close_matches(column, names, n=1, cutoff=0.75)
    return names[similar[0]] if similar else None
