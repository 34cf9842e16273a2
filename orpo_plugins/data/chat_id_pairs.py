"""Pairs for tokenizers that encode a conversation to token ids without a text in between, such as mistral-common's.

These tokenizers never encode text to a special token: "</s>" in a text is four ordinary characters.  So there is no
templated text to tokenize:

1. The tokenizer's own `apply_chat_template` encodes each complete conversation.
2. Each of the assistant's turns ends with EOS, and nothing else does.  So the ends of the turns are known.
3. The same turn behind a short question shows the turn's own ids, and so its length.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from orpo_plugins.data.chat_templates import special_tokens
from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder, PromptAndAnswer, Span, boundary, labels_inside
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.hooks.types import Message, Preference
from orpo_plugins.options import PairOptions

_QUESTION: Message = {"role": "user", "content": "the"}
_ANSWERS = ("the", "and")
"""Two answers whose first tokens differ in every vocabulary."""


def gives_chats_as_ids(tokenizer: Any) -> bool:
    """Whether the tokenizer does not encode the text of EOS as EOS."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None or not hasattr(tokenizer, "apply_chat_template"):
        return False
    text = tokenizer.convert_ids_to_tokens([eos])[0]
    return eos not in tokenizer([text], add_special_tokens=False)["input_ids"][0]


class ChatIdPairBuilder(PairBuilder):
    """`PairBuilder` for a tokenizer that `gives_chats_as_ids`.

    Raises:
        ConfigError: `apply_chat_template` refuses every conversation that ends with an answer.
        RowError: `apply_chat_template` refuses the conversation, or leaves out an answer; or a text begins or ends with
            a special token, which would be trained as text.
    """

    def __init__(self, tokenizer: Any, options: PairOptions | None = None) -> None:
        super().__init__(tokenizer, options)
        self._writes_tools = False
        self._special_texts = tuple(text for text in special_tokens(tokenizer).values() if text)
        self._answer_arguments = self._arguments_for_answers()
        first, second = ([_QUESTION, {"role": "assistant", "content": answer}] for answer in _ANSWERS)
        ids = self._conversation(first, {})
        self._question_length = boundary(ids, self._conversation(second, {}))

    def __call__(self, preference: Preference) -> BuiltPair | Dropped:
        """Builds one pair."""
        if reason := self._texts.unusable(preference):
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
        return self._with_eos_and_fit(answers, strings_templated=strings is not None)

    # ---- conversations

    def _check_template(self) -> None:
        """A tokenizer of this kind has no template: it has its own code."""

    def _chat_answer(self, preference: Preference, answer: Any) -> PromptAndAnswer:
        prompt: Any = preference.prompt
        messages = [*prompt, *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)]
        arguments = preference.template_arguments
        ids = self._conversation(messages, arguments)
        self._check_tools(messages, arguments, ids)
        spans = self._spans(messages, len(prompt), ids)
        spans = spans[-1:] if self.options.train_on == "last" else spans
        start = spans[0][0]
        return self._with_bos(PromptAndAnswer(ids[:start], ids[start:], labels_inside(spans, ids)[start:]))

    def _spans(self, messages: list[Message], start: int, ids: list[int]) -> list[Span]:
        """The spans, in the ids of a conversation, of the assistant's turns from message `start` on.

        The last EOS belongs to the last turn, and so on backwards: a tokenizer may leave out earlier turns.
        Consecutive messages of the assistant are one turn.
        """
        turns = [turn for turn in _assistant_turns(messages) if turn[1] > start]
        ends = [index + 1 for index, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        spans: list[Span] = []
        for (first, last), end in zip(reversed(turns), reversed(ends), strict=False):
            turn_ids = self._turn(messages[first:last])
            if ids[max(0, end - len(turn_ids)) : end] != turn_ids:
                break
            # The first messages of the turn may belong to the prompt.
            in_prompt = boundary(self._turn(messages[first:start])[:-1], turn_ids) if first < start else 0
            spans.insert(0, (end - len(turn_ids) + in_prompt, end))
        if len(spans) < len(turns):
            raise RowError(
                f"the tokenizer leaves out some of the assistant's turns (roles: {_roles(messages)}), for example tool "
                "calls before the last question: cut the conversation there, or filter the row out"
            )
        return spans

    def _turn(self, messages: list[Message]) -> list[int]:
        """The ids of one turn of the assistant, with its EOS."""
        return self._conversation([_QUESTION, *messages], {})[self._question_length :]

    def _conversation(self, messages: list[Message], arguments: Mapping[str, Any]) -> list[int]:
        """The ids of a complete conversation that ends with an answer, with EOS at the end."""
        typed, more = [_with_typed_parts(message) for message in messages], self._answer_arguments
        try:
            ids = list(self.tokenizer.apply_chat_template(typed, tokenize=True, return_dict=False, **more, **arguments))
        except Exception as error:  # tokenizers raise errors of any class
            kind = type(error).__name__
            raise RowError(
                f"the tokenizer refuses the messages (roles: {_roles(messages)}): {kind}: {error}"
            ) from error
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1] == eos else [*ids, eos]

    def _arguments_for_answers(self) -> dict[str, Any]:
        """The arguments of `apply_chat_template` for a conversation that ends with an answer.

        A tokenizer for inference (mistral-common's mode "test") accepts such a conversation only with
        `continue_final_message`, and writes no EOS.  A tokenizer for training (mode "finetuning") needs no argument.
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

    # ---- checks of what would silently be trained as something else

    def _check_text(self, column: str, value: Any) -> None:
        contents = [value] if isinstance(value, str) else [message["content"] for message in value or []]
        for content in contents:
            text = content.strip() if isinstance(content, str) else ""
            if text.startswith(self._special_texts) or text.endswith(self._special_texts):
                raise RowError(
                    f"column {column!r} has a special token at the beginning or end of a text, but this tokenizer "
                    "encodes it as ordinary text: give messages without special tokens, or strings without a template"
                )

    def _check_tools(self, messages: list[Message], arguments: Mapping[str, Any], ids: list[int]) -> None:
        if not arguments.get("tools") or self._writes_tools:
            return
        if self._conversation(messages, {key: value for key, value in arguments.items() if key != "tools"}) == ids:
            raise RowError(
                "the row has tools, but the tokenizer leaves them out, so the model would not know them: use a newer "
                "tokenizer, or remove the column"
            )
        self._writes_tools = True


def _assistant_turns(messages: list[Message]) -> list[Span]:
    """The messages of each turn of the assistant: (first, one past the last)."""
    turns, start = [], 0
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        size = len(list(group))
        if role == "assistant":
            turns.append((start, start + size))
        start += size
    return turns


def _with_typed_parts(message: Message) -> Message:
    """The message with a type in each part of its content.  The tokenizer would leave out a part without a type."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "text", **part} for part in content]
    return {**message, "content": parts}


def _roles(messages: list[Message]) -> str:
    return ", ".join(str(message["role"]) for message in messages)
