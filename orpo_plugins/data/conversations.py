"""Finds the prompt of two answers that may contain it, so that no prompt is trained twice.

Datasets write the same conversation in several ways (U: user, A: assistant):

    prompt          chosen         rejected       called here
    U1 A1 U2        A2             A2'            context and answers
    U1 A1 U2        U1 A1 U2 A2    U1 A1 U2 A2'   complete answers, and the context again
    U2              U1 A1 U2 A2    U1 A1 U2 A2'   complete answers, and the last question
    U1 A1 U2 A2     A2             A2'            a context that ends with one of the answers
    (none)          U1 A1 U2 A2    U1 A1 U2 A2'   complete answers alone

Each becomes the prompt U1 A1 U2 with the answers A2 and A2'.
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
    """Prompt, chosen answer and rejected answer, of answers that may contain the complete conversation.

    1. Take the system messages off.  All conversations that have some must have the same.
    2. If the context is complete and no answer contains it, it is the prompt.
    3. If each complete answer begins with the context, or with its question, cut that beginning off.
    4. Otherwise the prompt is in the answers: the messages with which both begin, or all but the last message if only
       one answer is complete.  The context must not contradict them.
    5. Messages with which both answers still begin move to the end of the prompt.

    An answer is complete if it begins with a question (`is_whole`).  Messages are the same if their role, text and tool
    calls are; spaces around the text and other keys do not matter.

    Raises:
        RowError: the answers contain another conversation than the context, which comes from `column`.
    """
    # 1.
    system = _system_of(context, chosen, rejected)
    context, chosen, rejected = (turns_of(messages) for messages in (context, chosen, rejected))
    if not chosen or not rejected:
        return system + context, chosen, rejected
    complete = [answer for answer in (chosen, rejected) if is_whole(answer)]
    # 2. and 3., then 5.
    answers = None
    if context and not complete:
        context, answers = _without_answer(context, chosen, rejected), (chosen, rejected)
    elif context:
        answers = _after_context(context, chosen, rejected)
    if answers is not None:
        # Equal answers come from a row without a rejected answer: no message moves to the prompt.
        shared = 0 if answers[0] == answers[1] else _shared_turns(*answers)
        return system + context + answers[0][:shared], answers[0][shared:], answers[1][shared:]
    # 4.
    if len(complete) == 1:
        prompt = complete[0][:-1]
        rests = [answer[-1:] if is_whole(answer) else answer for answer in (chosen, rejected)]
    else:
        shared = _shared_turns(chosen, rejected)
        prompt, rests = chosen[:shared], [chosen[shared:], rejected[shared:]]
    if not context or _agrees(context, prompt, complete):
        return system + prompt, rests[0], rests[1]
    if complete[0][0]["role"] != "user":  # not a question after all: a role that the chat template may know
        return system + context, chosen, rejected
    found, expected = (prompt or complete[0])[0]["content"], context[0]["content"]
    raise RowError(
        f"column {column!r} ({shortened(expected)}) and the conversations in 'chosen' and 'rejected' "
        f"({shortened(found)}) do not fit together. Make them agree, or leave column "
        f"{column!r} out"
    )


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of messages with which both answers begin.  Each answer keeps at least its last message."""
    return _common_length(chosen[:-1], rejected[:-1])


def _agrees(context: list[Message], prompt: list[Message], complete: list[list[Message]]) -> bool:
    """Whether the prompt that complete answers share contains everything that the context says."""
    if _begins_with(prompt[::-1], context[::-1]):
        return True  # the context is the end of the prompt
    if not _begins_with(context, prompt):
        return False
    # The context may go on behind the prompt: with one of the answers, or another answer, but not with a question.
    more = context[len(prompt) :]
    return all(not is_whole([m]) for m in more) or any(_begins_with(answer, context) for answer in complete)


def _system_of(*conversations: list[Message]) -> list[Message]:
    """The system messages at the beginning of the first conversation that has some.

    Raises `RowError` if the system messages of two conversations differ.
    """
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
    """Whether an answer is complete: it begins with a question."""
    return answer[0]["role"] not in ("assistant", "tool")


def _after_context(
    context: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message]] | None:
    """The answers without the context, or without its last question, at their beginning.

    None if a complete answer begins with neither.
    """
    rests = []
    for answer in (chosen, rejected):
        lengths = [len(context), *([1] if context[-1]["role"] == "user" else [])]
        overlap = next((n for n in lengths if n < len(answer) and _begins_with(answer, context[-n:])), 0)
        if is_whole(answer) and not overlap:
            return None
        rests.append(answer[overlap:] if is_whole(answer) else answer)
    return rests[0], rests[1]


def _without_answer(context: list[Message], chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The context; if it ends with one of the answers, without it."""
    for answer in (chosen, rejected):
        before = len(context) - len(answer)
        if before > 0 and _begins_with(context[before:], answer):
            return context[:before]
    return context


def _begins_with(messages: list[Message], beginning: list[Message]) -> bool:
    return _common_length(messages, beginning) == len(beginning)


def _common_length(first: list[Message], second: list[Message]) -> int:
    """The number of messages that are the same at the beginning of both conversations."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if not _same(one, other)), min(len(first), len(second)))


def _same(first: Message, second: Message) -> bool:
    """Whether two messages say the same.  Spaces around the text, and other keys such as an id, do not matter."""
    if first["role"] != second["role"] or first.get("tool_calls") != second.get("tool_calls"):
        return False
    return _plain_content(first) == _plain_content(second)


def _plain_content(message: Message) -> str:
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    return "".join(str(part.get("text", part)) if isinstance(part, Mapping) else str(part) for part in parts).strip()


# ---- texts


def count_turns(text: str) -> int:
    """The number of turns that a text writes out: "Human: ...", "### Response:", "[INST] ..."."""
    return sum(1 for _ in _TURN.finditer(text))


def holds_conversation(text: str, question: str) -> bool:
    """Whether a text has a turn that begins with the question, and behind the question another turn: the answer's."""
    for turn in _TURN.finditer(text):
        before, found, after = text[turn.end() :].lstrip().partition(question)
        if found and not before and not after[:1].isalnum() and count_turns(after):
            return True
    return False


def common_prefix(*texts: str) -> str:
    """The longest common beginning of all texts."""
    # The smallest and the largest text have the shortest common prefix.  Bisection compares long texts at C speed.
    first, last = min(texts), max(texts)
    known, limit = 0, min(len(first), len(last))
    while known < limit:
        middle = (known + limit + 1) // 2
        known, limit = (middle, limit) if last.startswith(first[known:middle], known) else (known, middle - 1)
    return first[:known]


def end_of_shared_words(chosen: str, rejected: str) -> int:
    """The end of the last word that both texts begin with.  Each text keeps at least one character."""
    shorter, longer = sorted((chosen.rstrip(), rejected.rstrip()), key=len)
    if longer.startswith(shorter) and any(turn.end() == len(shorter) for turn in _TURN.finditer(shorter)):
        return len(shorter)  # one of the answers is empty
    longest = max(0, min(len(chosen), len(rejected)) - 1)
    end = len(common_prefix(chosen[:longest], rejected[:longest]))
    if end and _in_word(chosen[end - 1]) and (_in_word(chosen[end]) or _in_word(rejected[end])):
        end = next((i for i in range(end, 0, -1) if not _in_word(chosen[i - 1])), 0)
    # Tokenizers write a word together with the space before it, so the space belongs to the answer.
    return end - 1 if chosen[:end].endswith(" ") else end


def _in_word(character: str) -> bool:
    """Whether a character is part of a word.  Wide characters are not: their scripts put no spaces between words."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"
