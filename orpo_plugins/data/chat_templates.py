"""A preference becomes three texts: the prompt, and prompt + answer for each answer.  The prompt stands once in each.

Message lists (`TextBuilder._chat_texts`):

1. Apply the chat template to prompt + chosen and to prompt + rejected.
2. Apply it to the prompt alone, with the generation prompt.  The prompt is what all three texts begin with:

       prompt      <|user|>Q<|end|><|assistant|>
       chosen      <|user|>Q<|end|><|assistant|>A<|end|>
       rejected    <|user|>Q<|end|><|assistant|>B<|end|>

3. If an answer has several messages, find the assistant's turns in it (`TextBuilder._span`).

Strings (`TextBuilder._plain_texts`):

1. If both answers contain the complete conversation, a prompt column is left out, so no prompt is trained twice.
2. Otherwise prompt and answer are joined as they are.  No template is applied.
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

_PLACEHOLDER = "~stand-in~"
"""The content of a message that is written only to see the text of the template around it."""
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
"""How the best-known chat templates begin a turn.  A dataset may use another template than the tokenizer."""
_LONG_PROMPT = 20
"""If both answers begin with a prompt of at least this many characters, that is no coincidence."""


class Texts(NamedTuple):
    """A preference as text."""

    prompt: str
    """The beginning that both texts have in common."""
    chosen: str
    """Prompt and chosen answer."""
    rejected: str
    """Prompt and rejected answer."""
    chosen_spans: list[tuple[int, int]] | None = None
    """Start and end of each assistant's turn in the chosen answer; None: everything after the prompt."""
    rejected_spans: list[tuple[int, int]] | None = None
    """The same for the rejected answer."""
    repaired: bool = False
    """The answers contained the complete conversation, so the prompt column was left out."""
    restated: bool = False
    """Both answers begin with the text of the prompt, so it stands twice.  This may be intended."""
    strings_joined: bool = False
    """Strings that contain no template were joined as they are."""
    strings_templated: bool = False
    """The chat template was applied to strings."""

    def until(self, eos: str) -> "Texts":
        """The same texts: the white space that the template writes after EOS is no part of an answer."""
        chosen, chosen_spans = _until(self.chosen, self.chosen_spans, eos)
        rejected, rejected_spans = _until(self.rejected, self.rejected_spans, eos)
        return self._replace(chosen=chosen, rejected=rejected, chosen_spans=chosen_spans, rejected_spans=rejected_spans)


class TextBuilder:
    """Called with a `Preference`, returns `Texts`.

    Args:
        tokenizer: see `PairBuilder`.

    Raises:
        ConfigError: there is a conversation, but no chat template, or one that does not write its messages.
        RowError: the template refuses a conversation, or the prompt of text with template markers cannot be found.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @functools.cached_property
    def _written(self) -> set[str]:
        """Of "tools" and "tool_calls", those that the template is known to write."""
        return set()

    def unusable(self, preference: Preference) -> str | None:
        """The reason why a row cannot be used, as far as its text shows; None if it can."""
        prompt = preference.prompt
        question = prompt if isinstance(prompt, str) else [m for m in prompt if m["role"] != "system"] or prompt
        if not _content(question).strip():
            return "empty prompt"
        for name, answer in (("chosen", preference.chosen), ("rejected", preference.rejected)):
            if answer is None:
                continue
            own = answer if isinstance(answer, str) else [m for m in answer if m["role"] == "assistant"]
            content = _content(own)
            if not own or not content.strip():
                return f"the {name} answer is empty"
            if self._special_text.fullmatch(content):
                return f"the {name} answer has special tokens only"
        return "chosen equals rejected" if preference.chosen == preference.rejected else None

    def __call__(self, preference: Preference) -> Texts:
        """The texts to tokenize.  A missing rejected answer counts as an empty one."""
        if preference.rejected is None:
            empty = "" if isinstance(preference.chosen, str) else [{"role": "assistant", "content": ""}]
            plain = None if preference.plain is None else replace(preference.plain, rejected="")
            preference = replace(preference, rejected=empty, plain=plain)
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        plain = preference if isinstance(preference.prompt, str) else preference.plain
        if plain is not None:
            strings = (str(plain.prompt), str(plain.chosen), str(plain.rejected))
            needs_no_template = plain is preference or not has_template or self.is_templated(plain)
            if needs_no_template or self._repeats_prompt(*strings):
                texts = self._plain_texts(*strings)
                return texts._replace(strings_joined=not self.is_templated(plain))
        if not has_template:
            raise ConfigError(
                "the dataset has conversations, but the tokenizer has no chat template: set tokenizer.chat_template, "
                "or call model, tokenizer = orpo_plugins.setup_chat_format(model, tokenizer) first"
            )
        _ = self._end_of_turn
        return self._chat_texts(preference)._replace(strings_templated=preference.plain is not None)

    @functools.cached_property
    def _end_of_turn(self) -> str:
        """The special token that ends an answer in the chat template; empty where the template writes none.

        Logs a warning, once, where this is not EOS: generation would go on after it.
        """
        messages = [{"role": "user", "content": _PLACEHOLDER}, {"role": "assistant", "content": _PLACEHOLDER}]
        try:
            closing = self._render(messages, {}).rpartition(_PLACEHOLDER)[2]
        except RowError:
            return ""  # a template that needs another message first
        found = re.search(self._special_pattern, closing) if self._special_pattern else None
        end = found.group() if found else ""
        eos = self.tokenizer.convert_ids_to_tokens([self.tokenizer.eos_token_id])[0]
        if end and end != eos:
            logger.warning(
                "the chat template ends an answer with %r, but the EOS token of the tokenizer is %r: answers are "
                "trained to end with both, and generation that stops at EOS alone does not stop at %r. Set "
                "tokenizer.eos_token to %r before training, or generate with eos_token_id=%d",
                end,
                eos,
                end,
                end,
                self.tokenizer.convert_tokens_to_ids(end),
            )
        return end

    # ---- strings

    def _plain_texts(self, prompt: str, chosen: str, rejected: str) -> Texts:
        if not self._repeats_prompt(prompt, chosen, rejected):
            question = prompt.strip()
            restated = len(question) >= _LONG_PROMPT and all(
                text.lstrip().startswith(question) and text.strip() != question for text in (chosen, rejected)
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
        """Whether both answers contain the complete conversation, so prompt + answer would contain the prompt twice.

        1. No answer begins with a turn of a template.  Then look for turns such as "Human:".  The answers must share a
           text that contains the prompt, and that goes on until the answer begins.  Answers may also just restate a
           question, even "Question: ...", or contain a short one by chance.  That is no conversation.
        2. Both answers begin with the template's opening of an answer: they are the assistant's turns alone.
        3. Both answers begin with a turn, and their common beginning contains the end of the prompt: yes.
        4. The prompt has a turn of the template itself: the answers go on from there.
        5. Both answers begin with a turn, and both have the same history before the answer: yes.
        6. Otherwise nobody can tell, and the row is an error.
        """
        shared, question = common_prefix(chosen, rejected), prompt.strip()
        with_turn = [name for name, text in (("chosen", chosen), ("rejected", rejected)) if self._starts_turn(text)]
        if not with_turn:
            # 1.
            after = shared.lstrip().removeprefix(question)
            begins_with_prompt = after != shared.lstrip()
            opens_answer = count_turns(question) > 1 or question.endswith(":") or count_turns(after) > 0
            conversation = bool(count_turns(question)) and begins_with_prompt and opens_answer
            answers_differ = len(shared) < min(len(chosen), len(rejected))
            return answers_differ and bool(question) and (conversation or holds_conversation(shared, question))
        opening = self._answer_opening
        if opening and chosen.startswith(opening) and rejected.startswith(opening):
            return False  # 2.
        history = shared[: shared.rindex(opening)] if opening and opening in shared else shared
        if len(with_turn) == 2 and question[-40:] in history:
            return True  # 3.
        if self._turn.search(prompt):
            return False  # 4.
        if len(with_turn) == 2 and history != shared:
            return True  # 5.
        text = chosen if "chosen" in with_turn else rejected
        raise RowError(
            f"{' and '.join(with_turn)}: the text begins with a special token ({_start(text)}), the prompt "
            f"({_start(prompt)}) does not, and the common beginning of both answers does not contain the prompt, so "
            "the prompt would be trained twice, or not at all. Pass message lists, or strings without the template"
        )

    def is_templated(self, plain: Preference) -> bool:
        """Whether strings contain a template already."""
        return any(self._starts_turn(str(text)) for text in (plain.prompt, plain.chosen, plain.rejected))

    def _starts_turn(self, text: str) -> bool:
        """Whether a text begins with BOS or with a turn of a template."""
        return self._turn.match(text.lstrip()) is not None

    # ---- message lists

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
        # The common prefix: the generation prompt may differ from how a finished answer begins (reasoning, spaces).
        opened = common_prefix(self._render(prompt, arguments, add_generation_prompt=starts_answer), *full)
        if one_turn:
            return Texts(opened, full[0], full[1])
        chosen, rejected = (
            [
                self._span(prompt + answer, len(prompt) + number, text, arguments)
                for number, message in enumerate(answer)
                if message["role"] == "assistant"
            ]
            for answer, text in zip(answers, full, strict=True)
        )
        return Texts(opened, full[0], full[1], chosen, rejected)

    def _span(self, messages: list[Message], turn: int, full: str, arguments: dict[str, Any]) -> tuple[int, int]:
        """Start and end, in the text `full` of all messages, of the assistant's message number `turn`.

        1. Render the messages before the turn.  The turn starts behind their text.
        2. Render the messages up to the turn.  The turn ends where their text ends.
        3. Some templates write a turn in another way once others follow, so `full` does not begin with these texts.
           Then render all messages with a placeholder as the turn's content:

               full        ...<|assistant|>hello<|end|><|user|>...
               replaced    ...<|assistant|>~stand-in~<|end|><|user|>...

           The turn starts where the two texts differ.  It ends with its closing text, here <|end|>, behind which both
           texts are the same.
        """
        opened = self._render(messages[:turn], arguments, add_generation_prompt=True)
        start = len(common_prefix(opened, full))
        closed = self._render(messages[: turn + 1], arguments)
        same_beginning = start == len(opened) or full.startswith(self._render(messages[:turn], arguments))
        if same_beginning and full.startswith(closed):
            return start, max(start, len(closed))
        # The placeholder keeps the tool calls: a template may require them before the answer of a tool.
        calls = {key: value for key, value in messages[turn].items() if key == "tool_calls"}
        others = [*messages[:turn], {"role": "assistant", "content": _PLACEHOLDER, **calls}, *messages[turn + 1 :]]
        replaced = self._render(others, arguments)
        closing = self._render(others[: turn + 1], arguments).rpartition(_PLACEHOLDER)[2]
        if not same_beginning:
            start = len(common_prefix(replaced, full))
        end = len(full) - len(replaced.rpartition(_PLACEHOLDER)[2]) + len(closing)
        return start, max(start, end)

    def _readable(self, messages: list[Message]) -> list[Message]:
        """The messages in a form that the template can write.  Most templates need a string in place of parts."""
        parts = any(not isinstance(message["content"], str) for message in messages)
        if not parts or self._writes_parts:
            return list(messages)
        return [{**message, "content": _content([message | {"tool_calls": None}])} for message in messages]

    @functools.cached_property
    def _writes_parts(self) -> bool:
        part = {"type": "text", "text": _PLACEHOLDER}
        try:
            written = self._render([{"role": "user", "content": [part]}], {})
        except RowError:
            return False
        return _PLACEHOLDER in written and str(part) not in written

    def _check_text(self, messages: list[Message]) -> None:
        """Raises `ConfigError` if the template leaves out messages whose content is a string."""
        strings = any(isinstance(content := message["content"], str) and content.strip() for message in messages)
        if strings and not self._writes_strings:
            raise ConfigError(
                "the chat template does not write messages whose content is a string (some templates of vision models "
                "do not), so their text would not be trained: give the content as [{'type': 'text', 'text': ...}], or "
                "set another tokenizer.chat_template"
            )

    @functools.cached_property
    def _writes_strings(self) -> bool:
        try:
            return _PLACEHOLDER in self._render([{"role": "user", "content": _PLACEHOLDER}], {})
        except RowError:
            return True  # the template requires more than one question, so this is not known

    def _check_tools(self, messages: list[Message], arguments: dict[str, Any], text: str) -> None:
        """Raises `RowError` if the template leaves out tools or tool calls.  Stops checking once it has written them.

        It leaves them out if the text without them is the same.
        """
        if arguments.get("tools") and "tools" not in self._written:
            without = {key: value for key, value in arguments.items() if key != "tools"}
            if self._renders_as(messages, without, text):
                raise RowError(
                    "the row has tools, but the chat template does not write them, so the model would not know them: "
                    "use a template that does, or remove the column"
                )
            self._written.add("tools")
        if any(message.get("tool_calls") for message in messages) and "tool_calls" not in self._written:
            bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
            if self._renders_as(bare, arguments, text):
                raise RowError(
                    "the messages have tool_calls, but the chat template does not write them: use a template that "
                    "does, or filter such rows out"
                )
            self._written.add("tool_calls")

    def _renders_as(self, messages: list[Message], arguments: dict[str, Any], text: str) -> bool:
        try:
            return self._render(messages, arguments) == text
        except RowError:  # the template fails without them
            return False

    def _render(self, messages: list[Message], arguments: dict[str, Any], **options: Any) -> str:
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **arguments))
            text.encode()
            return text
        except UnicodeEncodeError as error:
            raise RowError(
                f"the conversation contains {error.object[error.start]!r}, half of a surrogate pair, which no "
                "tokenizer accepts: look at system messages, roles, tools and tool calls"
            ) from error
        except Exception as error:  # templates raise errors of any class
            roles = ", ".join(str(message["role"]) for message in messages)
            raise RowError(f"the chat template refuses the messages (roles: {roles}): {error}") from error

    @functools.cached_property
    def _special_pattern(self) -> str:
        # Longest first: one special token may be the beginning of another.
        texts = sorted((text for text in special_tokens(self.tokenizer).values() if text), key=len, reverse=True)
        return "|".join(map(re.escape, texts))

    @functools.cached_property
    def _special_text(self) -> re.Pattern[str]:
        return re.compile(rf"(?:{self._special_pattern}|\s)+")

    @functools.cached_property
    def _turn(self) -> re.Pattern[str]:
        """Matches BOS and beginnings of turns.  Other special tokens (`<think>`, those of tools) may begin answers."""
        bos, special = getattr(self.tokenizer, "bos_token", None), special_tokens(self.tokenizer).values()
        markers = [marker for marker in _USUAL_TURNS if marker in special]
        if getattr(self.tokenizer, "chat_template", None) is not None:
            openings = [self._answer_opening, *map(self._turn_opening, ("system", "user", "assistant", "tool"))]
            markers += [marker for opening in openings if (marker := self._marker(opening, bos))]
        markers = sorted({*markers, *([bos] if bos else [])}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, markers)) or "(?!)")

    def _marker(self, opening: str, bos: str | None) -> str:
        """The first special token in the opening of a turn; the complete opening if it has no special token."""
        opening = opening.replace(bos, "") if bos else opening
        found = re.search(self._special_pattern, opening) if self._special_pattern else None
        return found.group() if found else opening.strip()

    def _turn_opening(self, role: str) -> str:
        """The text of the template before the content of a first message; empty if this role cannot come first."""
        try:
            return self._render([{"role": role, "content": _PLACEHOLDER}], {}).partition(_PLACEHOLDER)[0]
        except RowError:
            return ""

    @functools.cached_property
    def _answer_opening(self) -> str:
        """The generation prompt; empty without a template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return ""
        question = [{"role": "user", "content": _PLACEHOLDER}]
        try:
            asked = self._render(question, {})
            opened = self._render(question, {}, add_generation_prompt=True)
        except RowError:
            return ""  # the template requires more than one question
        return opened[len(asked) :] if opened.startswith(asked) else ""

    def __getstate__(self) -> dict[str, Any]:
        # Without cached properties, so that a copy in another process, or a hash, depends on the tokenizer alone.
        return {"tokenizer": self.tokenizer}


def _until(text: str, spans: list[tuple[int, int]] | None, eos: str) -> tuple[str, list[tuple[int, int]] | None]:
    """The text and its spans, without the white space that follows EOS at their ends."""

    def end(start: int, end: int) -> int:
        part = text[start:end].rstrip()
        return start + len(part) if part.endswith(eos) else end

    if spans is not None:
        spans = [(start, end(start, stop)) for start, stop in spans]
    return text[: end(0, len(text))], spans


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """All special tokens, by id: the named ones, and those that only a chat template uses.

    Without the unknown token, because it stands for text.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    added = added if isinstance(added, Mapping) else {}  # in mistral-common's tokenizers this is a method that raises
    ids = [*tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))]
    unknown = {getattr(tokenizer, "unk_token_id", None)} - {tokenizer.eos_token_id}
    texts = zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return {i: str(token) for i, token in texts if i not in unknown}


def _messages(value: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _content(value: str | list[Message]) -> str:
    """All text of a value.  Parts that are no text, and tool calls, are written as text."""
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
