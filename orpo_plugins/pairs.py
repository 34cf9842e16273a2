"""A preference becomes a pair of token sequences: template, answer boundary, BOS and EOS, truncation.

The answer's boundary is found in tokens: the whole text is tokenized at once, and the answer begins with the first
token that differs from the prompt's own tokens.  A token that merges the end of the prompt with the beginning of
the answer therefore belongs to the answer, and what the model sees is always the tokenization of the whole text.

On rows that nothing truncates, ids and labels are those of TRL's ORPOTrainer (1.9 to 1.16), with these intended
exceptions: user messages inside an answer of several turns are not labelled; an answer that follows an assistant's
turn begins with its own text, not with the end of that turn; templated answers beside a raw prompt do not repeat
it; and where prompt and answer merge over more than one token of the prompt, all tokens that hold text of the
answer are labelled (TRL leaves some out, or gives up).
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.interfaces import Message, Pair, Preference, TokenSequence
from orpo_plugins.predictions import IGNORE_INDEX
from orpo_plugins.row_formats import common_prefix

TRUNCATION_MODES = ("keep_end", "keep_start")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How long a pair may be, in tokens with BOS and EOS counted.

    A pair that is too long loses prompt first, until the longer answer fits or half of `max_length` is left for the
    answers; then each answer that is still too long is cut at its end, to the room that its own prompt leaves.

    Raises:
        ConfigError: a length below its minimum, lengths that contradict each other, an unknown mode.
    """

    max_length: int | None = 1024
    """Prompt and answer together; None: no limit."""
    max_prompt_length: int | None = None
    """The prompt; None: whatever `max_length` leaves."""
    max_completion_length: int | None = None
    """Each answer; None: whatever `max_length` leaves."""
    truncation_mode: str = "keep_end"
    """Which end of a prompt that is too long stays, "keep_end" or "keep_start".  BOS stays in both."""

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_prompt_length", 1), ("max_completion_length", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} is {value!r}: it must be None or a whole number of at least {least}")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ConfigError(f"unknown truncation_mode {self.truncation_mode!r}; known: {', '.join(TRUNCATION_MODES)}")
        if self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            raise ConfigError(
                f"max_prompt_length {self.max_prompt_length} leaves no room for an answer in max_length "
                f"{self.max_length}: lower it, or raise max_length"
            )


@dataclass(frozen=True, kw_only=True)
class BuiltPair:
    """A pair, and what was done to it."""

    pair: Pair
    prompt_truncated: bool = False
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    repaired: bool = False
    """The answers held the whole conversation beside a raw prompt, which was left out."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that is well-formed but teaches nothing."""

    reason: str


class Answer(NamedTuple):
    """One tokenized sequence before truncation, cut where its answer begins."""

    prompt: list[int]
    ids: list[int]
    labels: list[int]
    """As long as `ids`: the token, or -100 for text between the turns of the answer."""


class _Texts(NamedTuple):
    """A preference as text: the shared prompt, both whole texts, and the answer's spans in each (None: all of it)."""

    prompt: str
    chosen: str
    rejected: str
    chosen_spans: list[tuple[int, int]] | None = None
    rejected_spans: list[tuple[int, int]] | None = None
    repaired: bool = False


class PairBuilder:
    """Callable: `Preference` to `BuiltPair`, or `Dropped` with the reason.

    Args:
        tokenizer: anything that behaves like a transformers tokenizer: callable on a list of texts, with
            `eos_token_id`, `bos_token_id`, `all_special_ids`, and `apply_chat_template` for conversations.
        options: lengths.

    Raises:
        ConfigError: the tokenizer has no EOS token, or no chat template when a conversation needs one.
        RowError: a conversation that the template refuses, or templated text whose prompt cannot be found.
    """

    def __init__(self, tokenizer: Any, options: PairOptions | None = None) -> None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ConfigError(
                "the tokenizer has no EOS token, so the model would never learn where an answer ends: set "
                "tokenizer.eos_token to a token of its vocabulary, or call orpo_plugins.setup_chat_format"
            )
        self.tokenizer = tokenizer
        self.options = PairOptions() if options is None else options

    def __call__(self, preference: Preference) -> BuiltPair | Dropped:
        """Builds one pair."""
        if reason := self._unusable(preference):
            return Dropped(reason=reason)
        texts = self._texts(preference)
        if not texts.prompt.strip():
            return Dropped(reason="empty prompt")
        if texts.chosen == texts.rejected:
            return Dropped(reason="chosen equals rejected")
        chosen, rejected = self._tokens(texts)
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not self._special_ids.issuperset(answer.labels):
                continue
            return Dropped(reason=f"the {name} answer is empty after tokenization")
        return self.fit(self._close(chosen), self._close(rejected), repaired=texts.repaired)

    # ---- text

    def _unusable(self, preference: Preference) -> str | None:
        """Why a row cannot be used, as far as its text tells."""
        if not _content(preference.prompt).strip():
            return "empty prompt"
        for name, answer in (("chosen", preference.chosen), ("rejected", preference.rejected)):
            own = answer if isinstance(answer, str) else [m for m in answer if m["role"] == "assistant"]
            content = _content(own)
            if not own or not content.strip():
                return f"the {name} answer is empty"
            if self._special_text.fullmatch(content):
                return f"the {name} answer holds special tokens only"
        return "chosen equals rejected" if preference.chosen == preference.rejected else None

    def _texts(self, preference: Preference) -> _Texts:
        """The texts to tokenize, templated and with the prompt in them once."""
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        plain = preference if isinstance(preference.prompt, str) else preference.plain
        if plain is not None and (plain is preference or not has_template or self._is_templated(plain)):
            return self._plain_texts(str(plain.prompt), str(plain.chosen), str(plain.rejected))
        if not has_template:
            raise ConfigError(
                "the dataset holds conversations but the tokenizer has no chat template: set tokenizer.chat_template, "
                "or call model, tokenizer = orpo_plugins.setup_chat_format(model, tokenizer) first"
            )
        return self._chat_texts(preference)

    def _plain_texts(self, prompt: str, chosen: str, rejected: str) -> _Texts:
        if not self._repeats_prompt(prompt, chosen, rejected):
            return _Texts(prompt, prompt + chosen, prompt + rejected)
        shared = common_prefix(chosen, rejected)
        opening = self._answer_opening
        if opening and opening in shared:
            shared = shared[: shared.rindex(opening) + len(opening)]
        elif len(shared) < max(len(chosen), len(rejected)) and shared.endswith(" "):
            shared = shared[:-1]
        return _Texts(shared, chosen, rejected, repaired=True)

    def _repeats_prompt(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Whether both answers hold the whole conversation, so that prompt + answer would hold it twice."""
        shared = common_prefix(chosen, rejected)
        marked = [name for name, text in (("chosen", chosen), ("rejected", rejected)) if self._starts_marked(text)]
        own = prompt.strip()
        # A short prompt may stand in an answer by chance; what follows a template's marker is no chance.
        if own[-40:] in shared if marked else len(own) >= 20 and own in shared:
            return True
        if not marked or self._special_token.search(prompt):
            return False
        if len(marked) == 2 and self._answer_opening and self._answer_opening in shared:
            return not shared.startswith(self._answer_opening)
        text = chosen if "chosen" in marked else rejected
        raise RowError(
            f"{' and '.join(marked)}: the text begins with a special token ({_start(text)}), the prompt "
            f"({_start(prompt)}) does not, and what both answers share does not hold it: the prompt would be trained "
            "twice, or not at all. Pass message lists, or strings without the template"
        )

    def _is_templated(self, plain: Preference) -> bool:
        return any(self._starts_marked(str(text)) for text in (plain.prompt, plain.chosen, plain.rejected))

    def _starts_marked(self, text: str) -> bool:
        return self._special_token.match(text.lstrip()) is not None

    def _chat_texts(self, preference: Preference) -> _Texts:
        assert not isinstance(preference.prompt, str)
        prompt, arguments = list(preference.prompt), dict(preference.template_arguments)
        answers = [list(_messages(answer)) for answer in (preference.chosen, preference.rejected)]
        full = [self._render(prompt + answer, arguments) for answer in answers]
        starts_answer = all(answer[0]["role"] == "assistant" for answer in answers)
        one_turn = starts_answer and all(len(answer) == 1 for answer in answers)
        opened = self._render(prompt, arguments, add_generation_prompt=starts_answer)
        # A template may open an answer otherwise than it writes a finished one (a reasoning block, trimmed space).
        opened = common_prefix(opened, *full)
        if one_turn:
            return _Texts(opened, full[0], full[1])
        spans = [self._spans(prompt, answer, text, arguments) for answer, text in zip(answers, full, strict=True)]
        return _Texts(opened, full[0], full[1], spans[0], spans[1])

    def _spans(
        self, prompt: list[Message], answer: list[Message], full: str, arguments: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """Where the assistant's turns stand in the text of a conversation whose answer has several messages.

        The text before a turn is rendered for its beginning.  Its end is found from behind: what the template writes
        between the turn's closing and the next opening, rendered around a stand-in, since templates may rewrite
        earlier turns once others follow.
        """
        messages = prompt + answer
        turns = [k for k in range(len(prompt), len(messages)) if messages[k]["role"] == "assistant"]
        opened = [self._render(messages[:k], arguments, add_generation_prompt=True) for k in turns]
        starts = [len(common_prefix(text, full)) for text in opened]
        spans = []
        for number, k in enumerate(turns):
            following = turns[number + 1] if number + 1 < len(turns) else len(messages)
            end = starts[number + 1] if number + 1 < len(turns) else len(full)
            if following > k + 1:
                last = following == len(messages)
                end -= self._length_between(messages, k, following, arguments, opens=not last)
            spans.append((starts[number], max(end, starts[number])))
        return spans

    def _length_between(
        self, messages: list[Message], turn: int, following: int, arguments: dict[str, Any], *, opens: bool
    ) -> int:
        """Characters that the template writes after a turn's closing, up to the opening of the next turn."""
        stand_in = [*messages[:turn], {"role": "assistant", "content": _STAND_IN}]
        closed = self._render(stand_in, arguments).rpartition(_STAND_IN)[2]
        whole = self._render(stand_in + messages[turn + 1 : following], arguments, add_generation_prompt=opens)
        return max(0, len(whole.rpartition(_STAND_IN)[2]) - len(closed))

    def _render(self, messages: list[Message], arguments: dict[str, Any], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **arguments))
        except Exception as error:  # templates raise errors of their own choosing
            roles = ", ".join(str(message["role"]) for message in messages)
            raise RowError(f"the chat template refuses the messages (roles: {roles}): {error}") from error

    # ---- tokens

    def _tokens(self, texts: _Texts) -> tuple[Answer, Answer]:
        prompt, chosen, rejected = self._encode([texts.prompt, texts.chosen, texts.rejected])
        return (
            self._answer(prompt, chosen, texts.chosen, texts.chosen_spans),
            self._answer(prompt, rejected, texts.rejected, texts.rejected_spans),
        )

    def _answer(self, prompt: list[int], ids: list[int], text: str, spans: list[tuple[int, int]] | None) -> Answer:
        start = _boundary(prompt, ids)
        if spans is None:
            labels = ids[start:]
        else:
            cuts = self._encode([text[:cut] for span in spans for cut in span])
            tokens = [_boundary(beginning, ids) for beginning in cuts]
            marked = {i for begin, end in zip(tokens[::2], tokens[1::2], strict=True) for i in range(begin, end)}
            labels = [token if i in marked else IGNORE_INDEX for i, token in enumerate(ids)][start:]
        return self._with_bos(Answer(ids[:start], ids[start:], labels))

    def _with_bos(self, answer: Answer) -> Answer:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None or answer.prompt[:1] == [bos]:
            return answer
        return answer._replace(prompt=[bos, *answer.prompt])

    def _close(self, answer: Answer) -> Answer:
        """EOS at the end, unless it is the last token already.

        A template that ends with EOS and a newline gets another EOS, as TRL gives it: the labels must be the same.
        """
        eos = self.tokenizer.eos_token_id
        if answer.ids[-1] == eos:
            return answer
        label = eos if answer.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
        return answer._replace(ids=[*answer.ids, eos], labels=[*answer.labels, label])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Not verbose: what is longer than the model's limit is cut below.
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    # ---- length

    def fit(self, chosen: Answer, rejected: Answer, *, repaired: bool = False) -> BuiltPair | Dropped:
        """Cuts a pair to the options' lengths (see `PairOptions`)."""
        options = self.options
        limit = options.max_completion_length
        whole = (chosen, rejected)
        cut = [answer._replace(ids=answer.ids[:limit], labels=answer.labels[:limit]) for answer in whole]
        room = self._prompt_room(cut)
        prompts = self._cut_prompts([answer.prompt for answer in cut], room)
        prompt_truncated = any(len(new) < len(old.prompt) for new, old in zip(prompts, cut, strict=True))
        for i, (answer, prompt) in enumerate(zip(cut, prompts, strict=True)):
            left = None if options.max_length is None else max(0, options.max_length - len(prompt))
            cut[i] = Answer(prompt, answer.ids[:left], answer.labels[:left])
        for name, answer in zip(("chosen", "rejected"), cut, strict=True):
            if self._special_ids.issuperset(answer.labels):
                return Dropped(reason=f"no room is left for the {name} answer")
        if cut[0] == cut[1]:
            return Dropped(reason="chosen equals rejected after truncation")
        return BuiltPair(
            pair=Pair(chosen=_sequence(cut[0]), rejected=_sequence(cut[1])),
            prompt_truncated=prompt_truncated,
            chosen_truncated=len(cut[0].ids) < len(chosen.ids),
            rejected_truncated=len(cut[1].ids) < len(rejected.ids),
            repaired=repaired,
        )

    def _prompt_room(self, answers: Sequence[Answer]) -> int:
        """The tokens that the longer prompt may keep."""
        longest = max(len(answer.prompt) for answer in answers)
        room = longest if self.options.max_prompt_length is None else min(longest, self.options.max_prompt_length)
        if self.options.max_length is not None:
            fits = self.options.max_length - max(len(answer.ids) for answer in answers)
            room = min(room, max(fits, self.options.max_length // 2))
        return room

    def _cut_prompts(self, prompts: list[list[int]], room: int) -> list[list[int]]:
        """Both prompts, cut at the same place, so that what they share stays shared."""
        excess = max(len(prompt) for prompt in prompts) - room
        if excess <= 0:
            return prompts
        if self.options.truncation_mode == "keep_start":
            return [prompt[:room] for prompt in prompts]
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is not None and all(prompt[:1] == [bos] for prompt in prompts):
            return [[bos, *prompt[1 + excess :]] for prompt in prompts]
        return [prompt[excess:] for prompt in prompts]

    # ---- what the tokenizer's special tokens look like

    @functools.cached_property
    def _special_tokens(self) -> dict[int, str]:
        """All of them: the named ones, and the markers that only the chat template uses."""
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        ids = [*self.tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))]
        unknown = {getattr(self.tokenizer, "unk_token_id", None)} - {self.tokenizer.eos_token_id}
        texts = zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True)
        return {i: str(token) for i, token in texts if i not in unknown}  # what is unknown is text all the same

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset([*self._special_tokens, IGNORE_INDEX])

    @functools.cached_property
    def _special_pattern(self) -> str:
        # Longest first: one marker may begin like another.
        texts = sorted((text for text in self._special_tokens.values() if text), key=len, reverse=True)
        return "|".join(map(re.escape, texts))

    @functools.cached_property
    def _special_text(self) -> re.Pattern[str]:
        return re.compile(rf"(?:{self._special_pattern}|\s)+")

    @functools.cached_property
    def _special_token(self) -> re.Pattern[str]:
        return re.compile(self._special_pattern)

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
        return {"tokenizer": self.tokenizer, "options": self.options}


_STAND_IN = "~stand-in~"


def _boundary(beginning: list[int], ids: list[int]) -> int:
    """The first token of `ids` that differs from, or comes after, the tokens of the text's beginning."""
    shortest = min(len(beginning), len(ids))
    return next((i for i in range(shortest) if beginning[i] != ids[i]), shortest)


def _sequence(answer: Answer) -> TokenSequence:
    return TokenSequence(
        input_ids=answer.prompt + answer.ids, labels=[IGNORE_INDEX] * len(answer.prompt) + answer.labels
    )


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
