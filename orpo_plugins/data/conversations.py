"""What two answers have in common: the prompt of conversations and of texts, so that it is trained once.

Answers may hold the whole conversation, a prompt beside them may hold it too, or one of the answers.
"""

import re
import unicodedata
from collections.abc import Mapping

from orpo_plugins.data.row_values import shortened
from orpo_plugins.errors import RowError
from orpo_plugins.hooks.types import Message

_TURN = re.compile(
    r"(^|\n)\s*(#+ *)?(human|user|assistant|system|instruction|input|question|response|answer|post|bot|gpt|ai|q|a)\b"
    r"[^\n:]{0,20}:|<\|[^|>]+\|>|\[/?INST\]|<start_of_turn>",
    re.IGNORECASE,
)


def question_and_answers(
    context: list[Message], chosen: list[Message], rejected: list[Message], *, column: str = "prompt"
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected answer, of answers that may hold the whole conversation.

    A conversation that goes on with a user's message is whole, whatever stands before it as a system message.  It may
    begin with the context, or the context with it; spaces around texts and further keys of messages do not matter.

    Raises `RowError` where the conversations are others than the context, which stands in `column`: one would be
    trained beside the other.
    """
    system = _system_of(context, chosen, rejected)
    context, chosen, rejected = (turns_of(messages) for messages in (context, chosen, rejected))
    if not chosen or not rejected:
        return system + context, chosen, rejected
    whole = [answer for answer in (chosen, rejected) if is_whole(answer)]
    if context and not whole:
        return _explicit(system + _without_answer(context, chosen, rejected), chosen, rejected)
    if context and (split := _split_after(context, chosen, rejected)) is not None:
        return _explicit(system + context, *split)
    # The conversations themselves hold the prompt.
    if len(whole) == 1:
        shared = whole[0][:-1]
        rests = [answer[-1:] if is_whole(answer) else answer for answer in (chosen, rejected)]
    else:
        shared, *rests = _with_shared_turns([], chosen, rejected)
    if not context or _fits(context, shared, whole):
        return system + shared, rests[0], rests[1]
    if whole[0][0]["role"] != "user":  # nobody's question: a role that the chat template may know goes on
        return system + context, chosen, rejected
    found, expected = (shared or whole[0])[0]["content"], context[0]["content"]
    raise RowError(
        f"column {column!r} ({shortened(expected)}) and the conversations in 'chosen' and 'rejected' "
        f"({shortened(found)}) do not fit together. Make them agree, or leave column "
        f"{column!r} out"
    )


def _with_shared_turns(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The same, with the messages that both answers begin with at the end of the prompt; each keeps its last one."""
    length = _common_length(chosen[:-1], rejected[:-1])
    return prompt + chosen[:length], chosen[length:], rejected[length:]


def _explicit(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The same behind a prompt that the row names; a row without a rejected answer has its turns all the same."""
    return (prompt, chosen, rejected) if chosen == rejected else _with_shared_turns(prompt, chosen, rejected)


def _fits(context: list[Message], shared: list[Message], whole: list[list[Message]]) -> bool:
    """Whether whole conversations that share some messages say all that the context says."""
    if _begins_with(shared[::-1], context[::-1]):
        return True  # the last questions alone
    if not _begins_with(context, shared):
        return False
    # What follows there: one of the answers, or another one, but no question.
    more = context[len(shared) :]
    return all(not is_whole([m]) for m in more) or any(_begins_with(answer, context) for answer in whole)


def _system_of(*conversations: list[Message]) -> list[Message]:
    """The system messages at the beginning, of the first conversation that has some; all that have some agree."""
    found = [messages[: len(messages) - len(turns_of(messages))] for messages in conversations]
    found = [system for system in found if any(_plain_content(message) for message in system)]
    for other in found[1:]:
        if len(other) != len(found[0]) or not _begins_with(other, found[0]):
            texts = " and ".join(shortened(system[0]["content"]) for system in (found[0], other))
            raise RowError(
                f"the row has two system messages, {texts}, and both answers need the same prompt. Keep one of them, "
                "or filter the row out"
            )
    return found[0] if found else []


def turns_of(messages: list[Message]) -> list[Message]:
    """The messages after the system messages at the beginning."""
    first = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), None)
    return [] if first is None else messages[first:]


def is_whole(answer: list[Message]) -> bool:
    """Whether an answer begins with the question."""
    return answer[0]["role"] not in ("assistant", "tool")


def _split_after(
    context: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message]] | None:
    """What both answers go on with after the context, where each that is whole begins with it, or with its question."""
    rests = []
    for answer in (chosen, rejected):
        lengths = [len(context), *([1] if context[-1]["role"] == "user" else [])]
        overlap = next((n for n in lengths if n < len(answer) and _begins_with(answer, context[-n:])), 0)
        if is_whole(answer) and not overlap:
            return None
        rests.append(answer[overlap:] if is_whole(answer) else answer)
    return rests[0], rests[1]


def _without_answer(context: list[Message], chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The context without one of the answers at its end."""
    for answer in (chosen, rejected):
        before = len(context) - len(answer)
        if before > 0 and _begins_with(context[before:], answer):
            return context[:before]
    return context


def _begins_with(messages: list[Message], beginning: list[Message]) -> bool:
    return _common_length(messages, beginning) == len(beginning)


def _common_length(first: list[Message], second: list[Message]) -> int:
    """How many messages two conversations begin with that are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if not _same(one, other)), min(len(first), len(second)))


def _same(first: Message, second: Message) -> bool:
    """Whether two messages say the same; spaces around the text, and keys such as an id, do not count."""
    if first["role"] != second["role"] or first.get("tool_calls") != second.get("tool_calls"):
        return False
    return _plain_content(first) == _plain_content(second)


def _plain_content(message: Message) -> str:
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    return "".join(str(part.get("text", part)) if isinstance(part, Mapping) else str(part) for part in parts).strip()


# ---- texts


def count_turns(text: str) -> int:
    """How many turns of a conversation a text is written as: "Human: ...", "### Response:", "[INST] ..."."""
    return sum(1 for _ in _TURN.finditer(text))


def holds_conversation(text: str, question: str) -> bool:
    """Whether a text has a turn that begins with the question, and another one behind it: the answer's."""
    for turn in _TURN.finditer(text):
        before, found, behind = text[turn.end() :].lstrip().partition(question)
        if found and not before and not behind[:1].isalnum() and count_turns(behind):
            return True
    return False


def common_prefix(*texts: str) -> str:
    """What all texts begin with."""
    # Of sorted texts the first and the last differ the earliest; halving compares long texts at the speed of C.
    first, last = min(texts), max(texts)
    known, limit = 0, min(len(first), len(last))
    while known < limit:
        middle = (known + limit + 1) // 2
        known, limit = (middle, limit) if last.startswith(first[known:middle], known) else (known, middle - 1)
    return first[:known]


def end_of_shared_words(chosen: str, rejected: str) -> int:
    """Where the last word ends that both texts begin with; each text keeps at least one character."""
    shorter, longer = sorted((chosen.rstrip(), rejected.rstrip()), key=len)
    if longer.startswith(shorter) and any(turn.end() == len(shorter) for turn in _TURN.finditer(shorter)):
        return len(shorter)  # an answer is empty
    longest = max(0, min(len(chosen), len(rejected)) - 1)
    end = len(common_prefix(chosen[:longest], rejected[:longest]))
    if end and _in_word(chosen[end - 1]) and (_in_word(chosen[end]) or _in_word(rejected[end])):
        end = next((i for i in range(end, 0, -1) if not _in_word(chosen[i - 1])), 0)
    # Tokenizers write a word together with the space before it, so the space belongs to the answer.
    return end - 1 if chosen[:end].endswith(" ") else end


def _in_word(character: str) -> bool:
    """Whether a character is part of a word; scripts that write no spaces between words have none to keep whole."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"
