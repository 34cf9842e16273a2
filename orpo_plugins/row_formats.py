"""Row formats: how datasets write a prompt, a chosen and a rejected answer.

Everything that a format reads becomes a `Preference`: three strings, or three message lists.  Formats are told
apart by their columns and by whether a value is text or messages; a value that does not fit is the format's own
error, with the column's name, so that one bad row in a good dataset is not reported as an unknown format.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from orpo_plugins import plugins
from orpo_plugins.errors import RowError
from orpo_plugins.hookspecs import hookimpl
from orpo_plugins.interfaces import Message, Preference, RowFormat

Row = Mapping[str, Any]
_IMPLICIT_STRINGS = "strings, implicit prompt"

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""ShareGPT's names for the roles of chat templates; any other name is a role already."""
_CALL = "function_call"
"""ShareGPT's role of an assistant's message that is the JSON of a tool's call, or of several."""

_OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "context", "post", "user", "human"),
    "chosen": ("accepted", "preferred", "good", "better", "positive", "response_j", "chosen_response", "answer"),
    "rejected": ("dispreferred", "bad", "worse", "negative", "response_k", "rejected_response"),
}
"""What datasets call the three columns where they do not use these names."""


@hookimpl
def orpo_row_formats() -> list[RowFormat]:
    """The built-in formats; the first that matches reads the row."""
    return [
        RowFormat(
            name="sharegpt",
            columns="conversations (or messages), chosen, rejected (messages with from/value or role/content)",
            matches=_is_sharegpt,
            parse=_parse_sharegpt,
        ),
        RowFormat(
            name="alpaca",
            columns="instruction, input (optional), chosen, rejected (strings)",
            matches=lambda row: _has(row, "instruction", "chosen", "rejected") and not _has(row, "prompt"),
            parse=_parse_alpaca,
        ),
        RowFormat(
            name="conversational",
            columns="prompt, chosen, rejected (message lists)",
            matches=lambda row: _has(row, "prompt", "chosen", "rejected") and _is_messages(row["prompt"]),
            parse=_parse_conversational,
        ),
        RowFormat(
            name="conversational, implicit prompt",
            columns="chosen, rejected (message lists that begin alike)",
            matches=lambda row: (
                _has(row, "chosen", "rejected") and (_is_messages(row["chosen"]) or _is_messages(row["rejected"]))
            ),
            parse=_parse_implicit,
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
            parse=lambda row: _strings(_text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected")),
        ),
        RowFormat(
            name=_IMPLICIT_STRINGS,
            columns="chosen, rejected (strings that begin alike)",
            # A prompt under another name is a mistake to report, not a prompt to guess.
            matches=lambda row: _has(row, "chosen", "rejected") and _renamed(row, "prompt") is None,
            parse=_parse_implicit_strings,
        ),
    ]


_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_TEXT_ONLY = "Drop such rows, or remove the column where the texts stand by themselves"


def parse_row(row: Row, index: int | str, *, sft_rows: bool = False, template_strings: bool = False) -> Preference:
    """Reads a row with the first format of `plugins.row_formats()` that matches.

    Args:
        row: raw columns.
        index: the row's number (or any name for it), for messages.
        sft_rows: whether a row may have no rejected answer (no such column, or None in it).
        template_strings: whether a row of strings becomes a conversation, where its prompt has a column of its own.

    Raises:
        RowError: no format matches (naming the columns found and the formats known), or a value does not fit.
    """
    where = f"row {index}"
    if not isinstance(row, Mapping):
        raise RowError(f"{where}: expected a mapping from column to value, got {_kind(row)}")
    if media := next((column for column in _MEDIA if row.get(column)), None):
        raise RowError(f"{where}: column {media!r} is not empty, but only text can be trained on. {_TEXT_ONLY}")
    alone = sft_rows and row.get("rejected") is None and row.get("chosen") is not None
    if alone:
        row = {**row, "rejected": row["chosen"]}
    for row_format in plugins.row_formats():
        if row_format.matches(row):
            try:
                preference = row_format.parse(row)
                if template_strings and row_format.name != _IMPLICIT_STRINGS:
                    preference = _as_conversation(preference, row)
                return _alone(preference, row_format) if alone else preference
            except RowError as error:
                raise RowError(f"{where} ({row_format.name}): {error}") from error
    raise RowError(f"{where}: {_unknown_format(row)}")


def _alone(preference: Preference, row_format: RowFormat) -> Preference:
    """The preference without the rejected answer, whose place the chosen one has taken so that a format could read."""
    if row_format.name == _IMPLICIT_STRINGS:
        raise RowError("there is no 'prompt' column and no rejected answer, so where the answer begins is not known")
    plain = None if preference.plain is None else replace(preference.plain, rejected=None)
    return replace(preference, rejected=None, plain=plain)


def _as_conversation(preference: Preference, row: Row) -> Preference:
    """Strings as a user's message and an assistant's answers; the strings themselves stay beside them."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if not (isinstance(prompt, str) and isinstance(chosen, str)):
        return preference
    chat = _chat(row, _user(prompt), _assistant(chosen), _assistant(str(rejected)), plain=preference)
    return chat if rejected is not None else replace(chat, rejected=None)


def common_prefix(*texts: str) -> str:
    """What all texts begin with."""
    # Of sorted texts the first and the last differ the earliest; halving compares long texts at the speed of C.
    first, last = min(texts), max(texts)
    known, limit = 0, min(len(first), len(last))
    while known < limit:
        middle = (known + limit + 1) // 2
        known, limit = (middle, limit) if last.startswith(first[known:middle], known) else (known, middle - 1)
    return first[:known]


# ---- the formats


def _is_sharegpt(row: Row) -> bool:
    column = _conversation_column(row)
    return column is not None and _has(row, "chosen", "rejected") and isinstance(row[column], list | tuple)


def _conversation_column(row: Row) -> str | None:
    return next((name for name in ("conversations", "messages") if row.get(name) is not None), None)


def _parse_sharegpt(row: Row) -> Preference:
    prompt = _messages(row, str(_conversation_column(row)))
    return _chat(row, prompt, _messages(row, "chosen"), _messages(row, "rejected"))


def _parse_alpaca(row: Row) -> Preference:
    instruction, given = _text(row, "instruction"), _text(row, "input", default="")
    question = f"{instruction}\n{given}" if given.strip() else instruction
    prompt: list[Message] = []
    for turn in row.get("history") or []:
        prompt += _user(turn[0]) + _assistant(turn[1])
    sections = [f"### Instruction:\n{instruction}\n\n"]
    if given.strip():
        sections.append(f"### Input:\n{given}\n\n")
    plain_prompt = "".join([*sections, "### Response:\n"]) if question.strip() else ""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    plain = _strings(_before(_text(row, "system", default=""), plain_prompt), chosen, rejected)
    return _chat(
        row, prompt + _user(question), _assistant(chosen), _assistant(rejected), plain=None if prompt else plain
    )


def _parse_conversational(row: Row) -> Preference:
    prompt, chosen, rejected = (_messages(row, name) for name in ("prompt", "chosen", "rejected"))
    if _starts_with(chosen, prompt) and _starts_with(rejected, prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _chat(row, prompt, chosen, rejected)


def _parse_implicit(row: Row) -> Preference:
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    # Each answer keeps at least its last message, also where both lists are equal.
    longest = max(0, min(len(chosen), len(rejected)) - 1)
    shared = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    prompt = chosen[:shared]
    if not prompt and isinstance(row.get("prompt"), str):
        prompt = _user(row["prompt"])
    elif not any(message["role"] == "user" for message in prompt) and isinstance(row.get("prompt"), str):
        answers = chosen[shared:] + rejected[shared:]
        if all(message["role"] == "assistant" for message in answers):
            prompt = prompt + _user(row["prompt"])
    return _chat(row, prompt, chosen[shared:], rejected[shared:])


def _parse_system(row: Row) -> Preference:
    prompt, chosen, rejected = _text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected")
    plain = _strings(_before(_system_text(row["system"]), prompt), chosen, rejected)
    return _chat(row, _user(prompt), _assistant(chosen), _assistant(rejected), plain=plain)


def _parse_implicit_strings(row: Row) -> Preference:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    # Each answer keeps at least one character, also where both strings are equal.
    longest = max(0, min(len(chosen), len(rejected)) - 1)
    shared = len(common_prefix(chosen[:longest], rejected[:longest]))
    if shared == 0 and chosen != rejected:
        raise RowError(f"there is no 'prompt' column, and 'chosen' and 'rejected' do not begin alike. {_advice(row)}")
    if shared and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        # Tokenizers write a word together with the space before it, so the space belongs to the answer.
        shared -= 1
    return _strings(chosen[:shared], chosen[shared:], rejected[shared:])


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
    """Message lists, with the `system` column before them and what the template is to be given beside them."""
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise RowError(f"column 'chat_template_kwargs' is {_kind(given)}, expected a mapping")
    arguments: dict[str, Any] = _without_none(given)
    if tools := _tools(row.get("tools")):
        arguments["tools"] = tools
    system = _system_text(row.get("system"))
    if system.strip() and prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, template_arguments=arguments, plain=plain)


def _tools(value: Any) -> list[Any]:
    """The tools of a row: a list of their JSON schemas, or the JSON text of one."""
    tools = _from_json(value, "column 'tools'") if isinstance(value, str) and value.strip() else value
    if tools in (None, "") or isinstance(tools, list | tuple):
        return list(_without_none(tools or []))
    raise RowError(f"column 'tools' is {_kind(value)}, expected a list of JSON schemas, or the JSON text of one")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's calls, as chat templates read them."""
    calls = _from_json(value, where)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise RowError(f"{where} is {_kind(value)}, expected the JSON of a call: name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _from_json(value: Any, where: str) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError) as error:
        raise RowError(f"{where} is {_kind(value)}, which is no JSON: {error}") from error


def _without_none(value: Any) -> Any:
    """Mappings without keys that are None, all the way down: Arrow fills in what other rows have."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _system_text(value: Any) -> str:
    """The text of a `system` column: a string, a list of strings, or a list of messages."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        parts = [part.get("content", part.get("value")) if isinstance(part, Mapping) else part for part in value]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    raise RowError(f"column 'system' is {_kind(value)}, expected a string or a list of strings")


def _before(system: str, prompt: str) -> str:
    return f"{system}\n\n{prompt}" if system.strip() and prompt.strip() and system not in prompt else prompt


def _text(row: Row, column: str, default: str | None = None) -> str:
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(f"column {column!r} is {_kind(value)}, expected a string. {_remedy(column, value)}")
    return value


def _messages(row: Row, column: str) -> list[Message]:
    """The messages of a column; one message, or an answer written as a string, stands for a list of one."""
    value = row[column]
    if isinstance(value, str) and column in ("chosen", "rejected"):
        return _assistant(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError(f"column {column!r} is {_kind(value)}, expected a list of messages. {_remedy(column, value)}")
    return [_message(message, f"message {number} of column {column!r}") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is {_kind(message)}, expected a mapping with role and content (or from and value)")
    # Arrow fills keys that other messages have with None; templates ask whether a key is there.
    rest = {key: value for key, value in message.items() if value is not None}
    role = rest.pop("role", None) or rest.pop("from", None)
    content = rest.pop("content") if "content" in rest else rest.pop("value", None)
    if not isinstance(role, str):
        raise RowError(f"{where} has no role: its keys are {', '.join(map(str, message))}; expected role or from")
    if role == _CALL:
        rest["tool_calls"], content = _calls(content, where), ""
    if calls := rest.pop("tool_calls", None):  # no calls are no key: templates ask whether it is there
        calls = _from_json(calls, f"tool_calls of {where}") if isinstance(calls, str) else calls
        rest["tool_calls"], content = _without_none(calls), content or ""
    if isinstance(content, list | tuple):
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else "text" for part in content]
        if other := next((kind for kind in kinds if kind != "text"), None):
            raise RowError(f"{where} holds a part of type {other!r}, but only text can be trained on. {_TEXT_ONLY}")
    if not isinstance(content, str | list | tuple):
        raise RowError(f"{where} has {_kind(content)} as its content, expected a string: keys {', '.join(message)}")
    return {"role": "assistant" if role == _CALL else _ROLES.get(role, role), "content": content, **rest}


def _remedy(column: str, value: Any) -> str:
    if column == "rejected" and value is None:
        return "Fill it in, filter the row out, or train such rows with the NLL alone (sft_rows=True)"
    return "Fill it in, or filter the row out"


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[Message]:
    return [{"role": "assistant", "content": content}]


def _starts_with(messages: list[Message], beginning: list[Message]) -> bool:
    return bool(beginning) and len(messages) > len(beginning) and messages[: len(beginning)] == beginning


def _has(row: Row, *columns: str) -> bool:
    return all(column in row for column in columns)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping)


def _kind(value: Any) -> str:
    """A value in words: None, or its type and how it begins."""
    if value is None:
        return "None"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


# ---- the error for a row that no format reads


def _unknown_format(row: Row) -> str:
    found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "none"
    known = "".join(f"\n  {row_format.name}: {row_format.columns}" for row_format in plugins.row_formats())
    return f"no known row format fits. Columns found: {found}. {_advice(row)}\nKnown formats:{known}"


def _advice(row: Row) -> str:
    if renames := likely_renames(row):
        calls = "".join(f".rename_column({old!r}, {name!r})" for old, name in renames)
        return f"Did you mean dataset{calls}?"
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    return f"Missing: {', '.join(missing)}. Rename columns, or register a row format of your own (docs/plugins.md)."


def likely_renames(columns: Iterable[str]) -> list[tuple[str, str]]:
    """Columns that look like `prompt`, `chosen` or `rejected` under another name: (its name, the name to give it)."""
    row = dict.fromkeys(columns)
    return [(old, name) for name in ("prompt", "chosen", "rejected") if (old := _renamed(row, name)) is not None]


def _renamed(row: Row, column: str) -> str | None:
    """The column of the row that looks like `column` under another name."""
    if column in row:
        return None
    names = {str(name).lower().strip(): str(name) for name in row if name not in _OTHER_NAMES}
    known = [name for name in _OTHER_NAMES[column] if name in names]
    similar = known or difflib.get_close_matches(column, names, n=1, cutoff=0.75)
    return names[similar[0]] if similar else None
