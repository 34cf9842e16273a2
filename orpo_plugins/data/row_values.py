"""Reads the values of a row's columns as text and messages.  Errors name the column."""

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from orpo_plugins.errors import RowError
from orpo_plugins.hooks.types import Message

Row = Mapping[str, Any]

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    **{name: name for name in ("system", "user", "assistant", "tool")},
}
"""Names of roles in datasets, and the role of chat templates that each stands for.  Other names stay as they are."""
CALL = "function_call"
"""ShareGPT's role for an assistant's message that is the JSON of one or several tool calls."""

CONVERSATIONS = ("conversations", "messages")
"""Columns with a conversation.  It may end with an answer."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TEXT_ONLY = "Drop such rows, or remove the column if the texts make sense without it"


def tool_schemas(value: Any) -> list[Any]:
    """The tools of a row: a list of their JSON schemas, or the JSON text of one."""
    tools = _from_json(value, "column 'tools'") if isinstance(value, str) and value.strip() else value
    if tools in (None, "") or isinstance(tools, list | tuple):
        return list(without_none(tools or []))
    raise RowError(f"column 'tools' is {kind(value)}, expected a list of JSON schemas, or the JSON text of one")


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """ShareGPT's tool calls in the form that chat templates read."""
    calls = _from_json(value, place)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise RowError(f"{place} is {kind(value)}, expected the JSON of a call: name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _from_json(value: Any, place: str) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError) as error:
        raise RowError(f"{place} is {kind(value)}, which is not valid JSON: {error}") from error


def without_none(value: Any) -> Any:
    """Removes keys with the value None, at every depth.  Arrow adds such keys if other rows have them."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def system_text(value: Any) -> str:
    """The text of a `system` column: a string, a list of strings, or a list of messages."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _encodable(value, "column 'system'")
    if isinstance(value, list | tuple):
        parts = [part.get("content", part.get("value")) if isinstance(part, Mapping) else part for part in value]
        if all(isinstance(part, str) for part in parts):
            return _encodable("\n".join(parts), "column 'system'")
    raise RowError(f"column 'system' is {kind(value)}, expected a string or a list of strings")


def history_of(row: Row) -> list[Message]:
    """The messages of a `history` column: earlier turns as [question, answer] pairs or messages, or their JSON."""
    value = row.get("history")
    turns = _from_json(value, "column 'history'") if isinstance(value, str) and value.strip() else value
    if not turns:
        return []
    if isinstance(turns, list | tuple) and all(map(looks_like_a_message, turns)):
        return messages_of({"history": turns}, "history")
    if not isinstance(turns, list | tuple) or not all(isinstance(t, list | tuple) and len(t) == 2 for t in turns):
        raise RowError(f"column 'history' is {kind(value)}, expected a list of [question, answer] pairs, or messages")
    texts = [text_of({"history": text}, "history") for turn in turns for text in turn]
    return [m for text, role in zip(texts, (user, assistant) * len(turns), strict=True) for m in role(text)]


def text_of(row: Row, column: str, default: str | None = None) -> str:
    """The text of a column, or `default` if there is none."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(f"column {column!r} is {kind(value)}, expected a string. {_remedy(column, value)}")
    return _encodable(value, f"column {column!r}")


def _encodable(text: str, place: str) -> str:
    """Returns the text.  Raises `RowError` if it contains half of a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{place} contains {text[error.start]!r} at position {error.start}, half of a surrogate pair: the text was "
            "cut or decoded wrongly. Repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from error
    return text


def plain_value(value: Any) -> Any:
    """Converts values of numpy and pandas: arrays become lists, and NaN becomes None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    return None if str(value) in ("nan", "<NA>", "NaT") and not isinstance(value, str) else value


def messages_of(row: Row, column: str) -> list[Message]:
    """The messages of a column.  A single message, or an answer that is a string, becomes a list of one."""
    value = row[column]
    if isinstance(value, str) and column in ("chosen", "rejected", "rejected_response"):
        return assistant(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError(f"column {column!r} is {kind(value)}, expected a list of messages. {_remedy(column, value)}")
    return [_message(message, f"message {number} of column {column!r}") for number, message in enumerate(value)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"{place} is {kind(message)}, expected a mapping with role and content (or from and value)")
    # Arrow adds the keys of other messages with the value None.  Templates test whether a key exists.
    rest = {key: value for key, value in message.items() if value is not None}
    role = rest.pop("role", None) or rest.pop("from", None)
    content = rest.pop("content") if "content" in rest else rest.pop("value", None)
    if not isinstance(role, str):
        raise RowError(f"{place} has no role: its keys are {', '.join(map(str, message))}; expected role or from")
    if role == CALL:
        rest["tool_calls"], content = _calls(content, place), ""
    if calls := rest.pop("tool_calls", None):  # an empty list is left out: templates test whether the key exists
        calls = _from_json(calls, f"tool_calls of {place}") if isinstance(calls, str) else calls
        rest["tool_calls"], content = without_none(calls), content or ""
    if isinstance(content, list | tuple):
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else "text" for part in content]
        if other := next((kind for kind in kinds if kind != "text"), None):
            raise RowError(f"{place} has a part of type {other!r}, but only text can be trained on. {TEXT_ONLY}")
    if not isinstance(content, str | list | tuple):
        raise RowError(f"{place} has {kind(content)} as its content, expected a string: keys {', '.join(message)}")
    for part in [content] if isinstance(content, str) else content:
        _encodable(str(part.get("text", "")) if isinstance(part, Mapping) else str(part), place)
    known = ROLES.get(role.strip().lower(), role)
    return {"role": "assistant" if role == CALL else known, "content": content, **rest}


def _remedy(column: str, value: Any) -> str:
    if value is None:
        more = ", or train such rows with the NLL alone (sft_rows=True)" if column == "rejected" else ""
        return f"Fill it in, or filter the row out{more}"
    if isinstance(value, list | tuple | Mapping):
        return "Message lists belong in the columns prompt, chosen and rejected"
    # cast_column, because map would keep the type of the column.
    cast = f"dataset.cast_column({column!r}, datasets.Value('string'))"
    return f"Make it a string ({cast}, or str(...) where rows are dicts), or filter the row out"


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[Message]:
    return [{"role": "assistant", "content": content}]


def kind(value: Any) -> str:
    """A value in an error message: None, or its type and its beginning."""
    return "None" if value is None else f"{type(value).__name__} {shortened(value)}"


def shortened(value: Any) -> str:
    """A value in an error message, at most 60 characters long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# ---- message lists written as text

_TEXT_COLUMNS = ("instruction", "query", "system")
_LIST_COLUMNS = ("prompt", "chosen", "rejected", "rejected_messages", "rejected_response", *CONVERSATIONS)
_LIST_AS_TEXT = re.compile(
    r"""[\s\ufeff"]*(array\(|OrderedDict\()?[\[({].{0,300}?\\?['"](role|from)\\?['"]\s*[:,]\s*\\?['"]\w+\\?['"]""",
    re.DOTALL,
)
"""The beginning of a list of messages, written as JSON or printed by Python, numpy or pandas."""


def message_lists_in_texts(row: Row) -> dict[str, Any]:
    """The columns that contain messages as JSON or as printed by Python (in CSV exports, say), with the messages."""
    columns = (*_LIST_COLUMNS, *_TEXT_COLUMNS)
    texts = {column: row[column] for column in columns if isinstance(row.get(column), str)}
    found = {column: _messages_in(text, column) for column, text in texts.items() if _LIST_AS_TEXT.match(text)}
    return {column: messages for column, messages in found.items() if messages is not None}


def _messages_in(text: str, column: str) -> Any:
    """The messages that a text contains; None if it is ordinary text, for example an answer in JSON."""
    value: Any = text.strip().lstrip("\ufeff")
    for read in (json.loads, json.loads, ast.literal_eval):  # twice: JSON in a string of JSON
        if isinstance(value, str):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = read(value)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list | tuple):
        value = value["messages"]
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(messages, str):
        raise RowError(
            f"column {column!r} is the text of a list of messages ({shortened(text)}), but neither JSON nor a Python "
            "list. Perhaps numpy or pandas has printed it. Write the lists as JSON when you make the file"
        )
    if not isinstance(messages, list | tuple) or not messages or not all(map(looks_like_a_message, messages)):
        return None
    roles = {str(message.get("role") or message.get("from")).lower() for message in messages}
    is_answer = column.startswith(("chosen", "rejected"))
    return None if is_answer and not any(ROLES.get(role) == "assistant" for role in roles) else value


def looks_like_a_message(value: Any) -> bool:
    """Whether a value is a mapping with a role and a content."""
    if not isinstance(value, Mapping):
        return False
    return bool({"role", "from"} & value.keys()) and bool({"content", "value", "tool_calls"} & value.keys())
