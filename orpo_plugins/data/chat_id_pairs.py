"""Pairs for tokenizers that give conversations as token ids and not as text, as mistral-common's do.

With these no text is encoded to a special token: "</s>" in a text is four characters like any others.  So the
tokenizer's own `apply_chat_template` encodes each whole conversation, and the assistant's turns are found in its ids:
each ends with EOS, which nothing else does, and its own ids are those that the turn has behind a question alone.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orpo_plugins.data.chat_templates import special_tokens
from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder, PromptAndAnswer, boundary
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.hooks.types import Message, Preference
from orpo_plugins.options import PairOptions
from orpo_plugins.targets import IGNORE_INDEX

_QUESTION: Message = {"role": "user", "content": "the"}
_ANSWERS = ("the", "and")
"""Two answers whose first tokens differ in every vocabulary."""


def gives_chats_as_ids(tokenizer: Any) -> bool:
    """Whether the text of a special token is not encoded as that token."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None or not hasattr(tokenizer, "apply_chat_template"):
        return False
    text = tokenizer.convert_ids_to_tokens([eos])[0]
    return eos not in tokenizer([text], add_special_tokens=False)["input_ids"][0]


class ChatIdPairBuilder(PairBuilder):
    """`PairBuilder` for a tokenizer that `gives_chats_as_ids`.

    Raises:
        ConfigError: `apply_chat_template` refuses every conversation that ends with an answer.
        RowError: a conversation that it refuses, or of which it leaves out an answer; texts with special tokens at
            either end, which would be trained as text.
    """

    def __init__(self, tokenizer: Any, options: PairOptions | None = None) -> None:
        super().__init__(tokenizer, options)
        self._writes_tools = False
        self._markers = tuple(text for text in special_tokens(tokenizer).values() if text)
        self._end = self._end_of_conversations()
        first, second = ([_QUESTION, {"role": "assistant", "content": answer}] for answer in _ANSWERS)
        ids = self._conversation(first, {})
        self._opening = boundary(ids, self._conversation(second, {}))

    def __call__(self, preference: Preference) -> BuiltPair | Dropped:
        """Builds one pair."""
        if reason := self._write.unusable(preference):
            return Dropped(reason=reason)
        strings = preference if isinstance(preference.prompt, str) else preference.plain
        for name in ("prompt", "chosen", "rejected"):
            self._check_text(name, getattr(preference if strings is None else strings, name))
        if strings is preference:
            return super().__call__(preference)
        answers = [
            self._chat_answer(preference, answer) for answer in (preference.chosen, preference.rejected) if answer
        ]
        if answers[1:] == answers[:1]:
            return Dropped(reason="chosen equals rejected")
        built = self._fitted(answers)
        return built if isinstance(built, Dropped) else replace(built, strings_templated=strings is not None)

    # ---- conversations

    def _check_template(self) -> None:
        """There is no template to ask for: the tokenizer brings its own way."""

    def _chat_answer(self, preference: Preference, answer: Any) -> PromptAndAnswer:
        prompt: Any = preference.prompt
        messages = [*prompt, *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)]
        arguments = preference.template_arguments
        ids = self._conversation(messages, arguments)
        self._check_tools(messages, arguments, ids)
        spans = self._spans(messages, len(prompt), ids)
        spans = spans[-1:] if self.options.train_on == "last" else spans
        labeled = {place for begin, end in spans for place in range(begin, end)}
        labels = [token if place in labeled else IGNORE_INDEX for place, token in enumerate(ids)]
        start = spans[0][0]
        return self._with_bos(PromptAndAnswer(ids[:start], ids[start:], labels[start:]))

    def _spans(self, messages: list[Message], start: int, ids: list[int]) -> list[tuple[int, int]]:
        """Where the assistant's turns from message `start` on stand in the ids of the conversation.

        Counted from the end: a tokenizer may leave earlier turns out.  Messages of an assistant that follow each other
        are one turn.
        """
        turns = [turn for turn in _assistant_turns(messages) if turn[1] > start]
        ends = [place + 1 for place, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        spans: list[tuple[int, int]] = []
        for (first, last), end in zip(reversed(turns), reversed(ends), strict=False):
            own = self._turn(messages[first:last])
            if ids[max(0, end - len(own)) : end] != own:
                break
            shared = boundary(self._turn(messages[first:start])[:-1], own) if first < start else 0
            spans.insert(0, (end - len(own) + shared, end))
        if len(spans) < len(turns):
            raise RowError(
                f"the tokenizer does not write all of the assistant's turns (roles: {_roles(messages)}), as some leave "
                "out calls of tools before the last question: cut the conversation there, or filter the row out"
            )
        return spans

    def _turn(self, messages: list[Message]) -> list[int]:
        """The ids of one turn of the assistant, with its EOS."""
        return self._conversation([_QUESTION, *messages], {})[self._opening :]

    def _conversation(self, messages: list[Message], arguments: Mapping[str, Any]) -> list[int]:
        """The ids of a whole conversation, which ends with an answer and its EOS."""
        given = [_with_typed_parts(message) for message in messages]
        try:
            ids = list(
                self.tokenizer.apply_chat_template(given, tokenize=True, return_dict=False, **self._end, **arguments)
            )
        except Exception as error:  # tokenizers raise errors of their own choosing
            kind = type(error).__name__
            raise RowError(
                f"the tokenizer refuses the messages (roles: {_roles(messages)}): {kind}: {error}"
            ) from error
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1] == eos else [*ids, eos]

    def _end_of_conversations(self) -> dict[str, Any]:
        """The arguments with which a conversation may end with an answer.

        A tokenizer for inference (mistral-common's mode "test") takes one only as the beginning of an answer, without
        EOS; one for training (mode "finetuning") takes no other.
        """
        example = [_QUESTION, {"role": "assistant", "content": _ANSWERS[0]}]
        for arguments in ({}, {"continue_final_message": True}):
            try:
                self.tokenizer.apply_chat_template(example, tokenize=True, return_dict=False, **arguments)
            except Exception as error:
                refusal = error
            else:
                return arguments
        raise ConfigError(
            "the tokenizer does not encode special tokens that stand in text, and its apply_chat_template refuses a "
            f"question with an answer: {refusal}"
        )

    # ---- what would train something else in silence

    def _check_text(self, column: str, value: Any) -> None:
        contents = [value] if isinstance(value, str) else [message["content"] for message in value or []]
        for content in contents:
            text = content.strip() if isinstance(content, str) else ""
            if text.startswith(self._markers) or text.endswith(self._markers):
                raise RowError(
                    f"column {column!r} has a special token at the beginning or end of a text, where this tokenizer "
                    "encodes it as text: give messages without special tokens, or strings without a template"
                )

    def _check_tools(self, messages: list[Message], arguments: Mapping[str, Any], ids: list[int]) -> None:
        if not arguments.get("tools") or self._writes_tools:
            return
        if self._conversation(messages, {key: value for key, value in arguments.items() if key != "tools"}) == ids:
            raise RowError(
                "the row has tools, but the tokenizer does not write them, so the model would not know of them: use a "
                "newer one, or remove the column"
            )
        self._writes_tools = True


def _assistant_turns(messages: list[Message]) -> list[tuple[int, int]]:
    """(first, one past the last) of the messages of each turn of the assistant."""
    turns, place = [], 0
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        size = len(list(group))
        if role == "assistant":
            turns.append((place, place + size))
        place += size
    return turns


def _with_typed_parts(message: Message) -> Message:
    """The message with a type in every part of its content: a part without one would be passed over."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "text", **part} for part in content]
    return {**message, "content": parts}


def _roles(messages: list[Message]) -> str:
    return ", ".join(str(message["role"]) for message in messages)
