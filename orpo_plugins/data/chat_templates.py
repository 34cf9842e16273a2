"""A preference becomes text: the chat template applied, the prompt in it once.

Three texts come out: the prompt, and both whole conversations, each of which begins with the prompt.
"""

import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from orpo_plugins.data.conversations import common_prefix, count_turns, holds_conversation
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.hooks.types import Message, Preference

logger = logging.getLogger(__name__)

_STAND_IN = "~stand-in~"
"""Stands for a message's content where only the template around it is of interest."""
_USUAL_TURNS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|turn>",
    "<|start|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "[INST]",
)
"""What the best-known chat templates begin a turn with, for texts that another template than the tokenizer's wrote."""
_LONG_PROMPT = 20
"""A prompt of so many characters does not stand at the beginning of both answers by chance."""


class Texts(NamedTuple):
    """A preference as text: the shared prompt, both whole texts, and the answer's spans in each (None: all of it)."""

    prompt: str
    chosen: str
    rejected: str
    chosen_spans: list[tuple[int, int]] | None = None
    rejected_spans: list[tuple[int, int]] | None = None
    repaired: bool = False
    """The answers held the whole conversation beside a prompt without the template, which was left out."""
    restated: bool = False
    """Both answers begin with the prompt's text, which so stands twice; nothing tells whether that is meant."""
    strings_joined: bool = False
    """Strings without a template in them, joined as they are."""
    strings_templated: bool = False
    """Strings that the chat template was applied to."""

    def until(self, eos: str) -> "Texts":
        """Without the space that a template writes behind the EOS of an answer, or of an assistant's turn in it."""
        chosen, chosen_spans = _until(self.chosen, self.chosen_spans, eos)
        rejected, rejected_spans = _until(self.rejected, self.rejected_spans, eos)
        return self._replace(chosen=chosen, rejected=rejected, chosen_spans=chosen_spans, rejected_spans=rejected_spans)


class TextBuilder:
    """Callable: `Preference` to `Texts`.

    Args:
        tokenizer: see `PairBuilder`.

    Raises:
        ConfigError: a conversation, and no chat template, or one that does not write it.
        RowError: a conversation that the template refuses, or templated text whose prompt cannot be found.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @functools.cached_property
    def _written(self) -> set[str]:
        """Which of "tools" and "tool_calls" the template has been seen to write."""
        return set()

    def unusable(self, preference: Preference) -> str | None:
        """Why a row cannot be used, as far as its text tells."""
        prompt = preference.prompt
        asked = prompt if isinstance(prompt, str) else [m for m in prompt if m["role"] != "system"] or prompt
        if not _content(asked).strip():
            return "empty prompt"
        for name, answer in (("chosen", preference.chosen), ("rejected", preference.rejected)):
            if answer is None:
                continue
            own = answer if isinstance(answer, str) else [m for m in answer if m["role"] == "assistant"]
            content = _content(own)
            if not own or not content.strip():
                return f"the {name} answer is empty"
            if self._special_text.fullmatch(content):
                return f"the {name} answer holds special tokens only"
        return "chosen equals rejected" if preference.chosen == preference.rejected else None

    def __call__(self, preference: Preference) -> Texts:
        """The texts to tokenize, templated and with the prompt in them once.

        Where there is no rejected answer, an empty one stands in.
        """
        if preference.rejected is None:
            stand_in = "" if isinstance(preference.chosen, str) else [{"role": "assistant", "content": ""}]
            plain = None if preference.plain is None else replace(preference.plain, rejected="")
            preference = replace(preference, rejected=stand_in, plain=plain)
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        plain = preference if isinstance(preference.prompt, str) else preference.plain
        if plain is not None:
            strings = (str(plain.prompt), str(plain.chosen), str(plain.rejected))
            untouched = plain is preference or not has_template or self.is_templated(plain)
            if untouched or self._repeats_prompt(*strings):
                texts = self._plain_texts(*strings)
                return texts._replace(strings_joined=not self.is_templated(plain))
        if not has_template:
            raise ConfigError(
                "the dataset holds conversations but the tokenizer has no chat template: set tokenizer.chat_template, "
                "or call model, tokenizer = orpo_plugins.setup_chat_format(model, tokenizer) first"
            )
        _ = self._end_of_turn
        return self._chat_texts(preference)._replace(strings_templated=preference.plain is not None)

    @functools.cached_property
    def _end_of_turn(self) -> str:
        """The special token with which the chat template ends an answer; empty where it writes none.

        Logs a warning, once, where that is not EOS: generation would go on behind it.
        """
        messages = [{"role": "user", "content": _STAND_IN}, {"role": "assistant", "content": _STAND_IN}]
        try:
            closing = self._render(messages, {}).rpartition(_STAND_IN)[2]
        except RowError:
            return ""  # a template that wants something else first
        found = re.search(self._special_pattern, closing) if self._special_pattern else None
        end, eos = found.group() if found else "", self.tokenizer.convert_ids_to_tokens([self.tokenizer.eos_token_id])
        if end and end != eos[0]:
            logger.warning(
                "the chat template ends an answer with %r, and the tokenizer's EOS token is %r: answers are trained to "
                "end with both, and a chat that stops at EOS alone shows %r and what follows. Set tokenizer.eos_token "
                "to %r before training, or generate with eos_token_id=%d",
                end,
                eos[0],
                end,
                end,
                self.tokenizer.convert_tokens_to_ids(end),
            )
        return end

    def _plain_texts(self, prompt: str, chosen: str, rejected: str) -> Texts:
        if not self._repeats_prompt(prompt, chosen, rejected):
            own = prompt.strip()
            restated = len(own) >= _LONG_PROMPT and all(
                text.lstrip().startswith(own) and text.strip() != own for text in (chosen, rejected)
            )
            return Texts(prompt, prompt + chosen, prompt + rejected, restated=restated)
        shared = common_prefix(chosen, rejected)
        opening = self._answer_opening
        if opening and opening in shared:
            shared = shared[: shared.rindex(opening) + len(opening)]
        elif len(shared) < max(len(chosen), len(rejected)) and shared.endswith(" "):
            shared = shared[:-1]
        return Texts(shared, chosen, rejected, repaired=True)

    def _repeats_prompt(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Whether both answers hold the whole conversation, so that prompt + answer would hold it twice.

        Only turns tell: those that the chat template writes, or "Human:" and the like in the prompt.  A question that
        both answers restate, or a short one that they happen to hold, is no conversation.
        """
        shared, own = common_prefix(chosen, rejected), prompt.strip()
        marked = [name for name, text in (("chosen", chosen), ("rejected", rejected)) if self._starts_turn(text)]
        if not marked:
            # Up to where the answer begins: a question alone, even "Question: ...", may be restated.
            behind = shared.lstrip().removeprefix(own)
            opens_answer = count_turns(own) > 1 or own.endswith(":") or count_turns(behind) > 0
            whole = bool(count_turns(own)) and behind != shared.lstrip() and opens_answer
            goes_on = len(shared) < min(len(chosen), len(rejected))
            return goes_on and bool(own) and (whole or holds_conversation(shared, own))
        opening = self._answer_opening
        if opening and chosen.startswith(opening) and rejected.startswith(opening):
            return False  # the answers' own turns alone
        history = shared[: shared.rindex(opening)] if opening and opening in shared else shared
        if len(marked) == 2 and own[-40:] in history:
            return True
        if self._turn.search(prompt):
            return False
        if len(marked) == 2 and history != shared:
            return True
        text = chosen if "chosen" in marked else rejected
        raise RowError(
            f"{' and '.join(marked)}: the text begins with a special token ({_start(text)}), the prompt "
            f"({_start(prompt)}) does not, and what both answers share does not hold it: the prompt would be trained "
            "twice, or not at all. Pass message lists, or strings without the template"
        )

    def is_templated(self, plain: Preference) -> bool:
        """Whether a template has been applied to strings already."""
        return any(self._starts_turn(str(text)) for text in (plain.prompt, plain.chosen, plain.rejected))

    def _starts_turn(self, text: str) -> bool:
        """Whether a text begins as a chat template begins: with BOS, or with a turn."""
        return self._turn.match(text.lstrip()) is not None

    def _chat_texts(self, preference: Preference) -> Texts:
        assert not isinstance(preference.prompt, str)
        prompt, arguments = self._readable(preference.prompt), dict(preference.template_arguments)
        given = (preference.chosen, preference.rejected)
        answers = [self._readable(_messages(answer)) for answer in given if answer is not None]
        full = [self._render(prompt + answer, arguments) for answer in answers]
        for answer, text in zip(answers, full, strict=True):
            self._check_text(prompt + answer)
            self._check_tools(prompt + answer, arguments, text)
        starts_answer = all(answer[0]["role"] == "assistant" for answer in answers)
        one_turn = starts_answer and all(len(answer) == 1 for answer in answers)
        opened = self._render(prompt, arguments, add_generation_prompt=starts_answer)
        # A template may open an answer otherwise than it writes a finished one (a reasoning block, trimmed space).
        opened = common_prefix(opened, *full)
        if one_turn:
            return Texts(opened, full[0], full[1])
        chosen, rejected = (
            [
                self._span(prompt + answer, len(prompt) + place, text, arguments)
                for place, message in enumerate(answer)
                if message["role"] == "assistant"
            ]
            for answer, text in zip(answers, full, strict=True)
        )
        return Texts(opened, full[0], full[1], chosen, rejected)

    def _span(self, messages: list[Message], turn: int, full: str, arguments: dict[str, Any]) -> tuple[int, int]:
        """Where an assistant's turn stands in the text of a conversation whose answer has several messages.

        What comes before the turn is rendered for its beginning, and then the turn for its end.  Where the template
        rewrites these once others follow, the whole conversation is rendered with a stand-in for the turn's content:
        what is alike before it and what follows its closing are no part of the turn.
        """
        opened = self._render(messages[:turn], arguments, add_generation_prompt=True)
        start = len(common_prefix(opened, full))
        closed = self._render(messages[: turn + 1], arguments)
        opens_alike = start == len(opened) or full.startswith(self._render(messages[:turn], arguments))
        if opens_alike and full.startswith(closed):
            return start, max(start, len(closed))
        # With its calls, because a template may want one before a tool's answer.
        calls = {key: value for key, value in messages[turn].items() if key == "tool_calls"}
        others = [*messages[:turn], {"role": "assistant", "content": _STAND_IN, **calls}, *messages[turn + 1 :]]
        replaced = self._render(others, arguments)
        closing = self._render(others[: turn + 1], arguments).rpartition(_STAND_IN)[2]
        if not opens_alike:
            start = len(common_prefix(replaced, full))
        end = len(full) - len(replaced.rpartition(_STAND_IN)[2]) + len(closing)
        return start, max(start, end)

    def _readable(self, messages: list[Message]) -> list[Message]:
        """Messages as the template can write them: content in parts is one string for most."""
        parts = any(not isinstance(message["content"], str) for message in messages)
        if not parts or self._writes_parts:
            return list(messages)
        return [{**message, "content": _content([message | {"tool_calls": None}])} for message in messages]

    @functools.cached_property
    def _writes_parts(self) -> bool:
        part = {"type": "text", "text": _STAND_IN}
        try:
            written = self._render([{"role": "user", "content": [part]}], {})
        except RowError:
            return False
        return _STAND_IN in written and str(part) not in written

    def _check_text(self, messages: list[Message]) -> None:
        """Raises `ConfigError` where the template passes over contents that are strings."""
        strings = any(isinstance(content := message["content"], str) and content.strip() for message in messages)
        if strings and not self._writes_strings:
            raise ConfigError(
                "the chat template does not write messages whose content is a string, as those of some vision models, "
                "so nothing of them would be trained: give the content as [{'type': 'text', 'text': ...}], or set "
                "another tokenizer.chat_template"
            )

    @functools.cached_property
    def _writes_strings(self) -> bool:
        try:
            return _STAND_IN in self._render([{"role": "user", "content": _STAND_IN}], {})
        except RowError:
            return True  # a template that wants more than a question, as far as can be told

    def _check_tools(self, messages: list[Message], arguments: dict[str, Any], text: str) -> None:
        """Raises `RowError` where the template leaves out tools or their calls, once it is known not to do so."""
        if arguments.get("tools") and "tools" not in self._written:
            without = {key: value for key, value in arguments.items() if key != "tools"}
            if self._gives(messages, without, text):
                raise RowError(
                    "the row has tools, but the chat template does not write them, so the model would not know of "
                    "them: use a template that does, or remove the column"
                )
            self._written.add("tools")
        if any(message.get("tool_calls") for message in messages) and "tool_calls" not in self._written:
            bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
            if self._gives(bare, arguments, text):
                raise RowError(
                    "the messages hold tool_calls, but the chat template does not write them: use a template that "
                    "does, or filter such rows out"
                )
            self._written.add("tool_calls")

    def _gives(self, messages: list[Message], arguments: dict[str, Any], text: str) -> bool:
        try:
            return self._render(messages, arguments) == text
        except RowError:  # what was left out is missed
            return False

    def _render(self, messages: list[Message], arguments: dict[str, Any], **options: Any) -> str:
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **arguments))
            text.encode()
            return text
        except UnicodeEncodeError as error:
            raise RowError(
                f"the conversation holds {error.object[error.start]!r}, half of a surrogate pair, which no tokenizer "
                "takes: look at system messages, roles, tools and their calls"
            ) from error
        except Exception as error:  # templates raise errors of their own choosing
            roles = ", ".join(str(message["role"]) for message in messages)
            raise RowError(f"the chat template refuses the messages (roles: {roles}): {error}") from error

    @functools.cached_property
    def _special_pattern(self) -> str:
        # Longest first: one marker may begin like another.
        texts = sorted((text for text in special_tokens(self.tokenizer).values() if text), key=len, reverse=True)
        return "|".join(map(re.escape, texts))

    @functools.cached_property
    def _special_text(self) -> re.Pattern[str]:
        return re.compile(rf"(?:{self._special_pattern}|\s)+")

    @functools.cached_property
    def _turn(self) -> re.Pattern[str]:
        """What turns begin with, and BOS.  Other special tokens (`<think>`, a tool's) may begin an answer."""
        bos, special = getattr(self.tokenizer, "bos_token", None), special_tokens(self.tokenizer).values()
        markers = [marker for marker in _USUAL_TURNS if marker in special]
        if getattr(self.tokenizer, "chat_template", None) is not None:
            openings = [self._answer_opening, *map(self._turn_opening, ("system", "user", "assistant", "tool"))]
            markers += [marker for opening in openings if (marker := self._marker(opening, bos))]
        markers = sorted({*markers, *([bos] if bos else [])}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, markers)) or "(?!)")

    def _marker(self, opening: str, bos: str | None) -> str:
        """The first special token of a turn's opening, or all of an opening that has none."""
        own = opening.replace(bos, "") if bos else opening
        found = re.search(self._special_pattern, own) if self._special_pattern else None
        return found.group() if found else own.strip()

    def _turn_opening(self, role: str) -> str:
        """What the chat template writes before the content of a message; empty where it takes no such message first."""
        try:
            return self._render([{"role": role, "content": _STAND_IN}], {}).partition(_STAND_IN)[0]
        except RowError:
            return ""

    @functools.cached_property
    def _answer_opening(self) -> str:
        """What the chat template writes before an answer; empty where there is no template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return ""
        question = [{"role": "user", "content": _STAND_IN}]
        try:
            asked = self._render(question, {})
            opened = self._render(question, {}, add_generation_prompt=True)
        except RowError:
            return ""  # a template that wants more than a question
        return opened[len(asked) :] if opened.startswith(asked) else ""

    def __getstate__(self) -> dict[str, Any]:
        # Without what is derived: a copy in another process, or a hash, depends on the arguments alone.
        return {"tokenizer": self.tokenizer}


def _until(text: str, spans: list[tuple[int, int]] | None, eos: str) -> tuple[str, list[tuple[int, int]] | None]:
    def end(start: int, end: int) -> int:
        part = text[start:end].rstrip()
        return start + len(part) if part.endswith(eos) else end

    if spans is not None:
        spans = [(start, end(start, stop)) for start, stop in spans]
    return text[: end(0, len(text))], spans


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """All of them by id: the named ones, and the markers that only a chat template uses.

    Without the unknown token: what is unknown to the tokenizer is text all the same.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    added = added if isinstance(added, Mapping) else {}  # of mistral-common's tokenizers it is a method that raises
    ids = [*tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))]
    unknown = {getattr(tokenizer, "unk_token_id", None)} - {tokenizer.eos_token_id}
    texts = zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return {i: str(token) for i, token in texts if i not in unknown}


def _messages(value: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _content(value: str | list[Message]) -> str:
    """All text in a value; parts that are no text, and calls of tools, count as text."""
    if isinstance(value, str):
        return value
    texts = []
    for message in value:
        content = message["content"]
        parts = [content] if isinstance(content, str) else content
        text = "".join(str(part.get("text") or part) if isinstance(part, dict) else str(part) for part in parts)
        texts.append(text + str(message.get("tool_calls") or ""))
    return "\n".join(texts)


def _start(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
