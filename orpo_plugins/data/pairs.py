"""A preference becomes a pair of token sequences.

1. Text: write the prompt and both complete texts, prompt + answer (`chat_templates.py`).
2. Tokens: tokenize each text at once.  The model always sees the tokenization of the complete text.
3. Boundary: the answer begins with the first token that differs from the tokens of the prompt alone:

       prompt           "the fo"           the | fo
       complete text    "the fox jumps"    the | fox | jumps
       labels                              -100  fox   jumps

   So a token that holds the end of the prompt and the beginning of the answer belongs to the answer.
4. Labels: in a conversation of several turns, only the assistant's turns get labels.
5. BOS at the beginning and EOS at the end, once each.
6. Truncation to the lengths of `PairOptions` (`PairBuilder.fit`).

Without truncation, ids and labels are those of TRL's ORPOTrainer (1.9 to 1.16), with these intended exceptions:

- An answer ends with the first EOS.  `PairOptions.repeat_eos` ends it as TRL does.
- User messages inside an answer have no label.
- If the prompt ends with an assistant's turn, the answer begins with its own text, not with the end of that turn.
- If the answers contain the prompt (in the chat template), it is not written twice.
- If prompt and answer merge over several tokens, all tokens with text of the answer have a label.  TRL leaves some
  out, or raises an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from orpo_plugins.data.chat_templates import TextBuilder, Texts, special_tokens
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.hooks.types import Pair, Preference, TokenSequence
from orpo_plugins.options import PairOptions
from orpo_plugins.targets import IGNORE_INDEX

Span = tuple[int, int]
"""Start and end of a part of a text or of a token sequence; the end is exclusive."""


@dataclass(frozen=True, kw_only=True)
class BuiltPair:
    """A pair, and what happened on the way from its row."""

    pair: Pair
    prompt_truncated: bool = False
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    repaired: bool = False
    """The answers contained the complete conversation, so the prompt column was left out."""
    restated: bool = False
    """Both answers begin with the text of the prompt."""
    strings_joined: bool = False
    """Strings that contain no template were joined as they are."""
    strings_templated: bool = False
    """The chat template was applied to strings."""

    @property
    def sft_only(self) -> bool:
        """There is no rejected answer."""
        return not self.pair.rejected.input_ids

    @property
    def weighted(self) -> bool:
        """The row has a weight other than 1."""
        return self.pair.weight != 1

    @property
    def with_margin(self) -> bool:
        """The row has a margin other than 0."""
        return self.pair.margin != 0


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that is well-formed, but that cannot be trained on."""

    reason: str


class PromptAndAnswer(NamedTuple):
    """One tokenized sequence, split where its answer begins."""

    prompt: list[int]
    """Token ids of the prompt."""
    ids: list[int]
    """Token ids of the answer."""
    labels: list[int]
    """One per answer token: the token itself, or -100 between the assistant's turns."""


class PairBuilder:
    """Called with a `Preference`, returns a `BuiltPair`, or `Dropped` with the reason.

    Args:
        tokenizer: anything that behaves like a transformers tokenizer: callable on a list of texts, with
            `eos_token_id`, `bos_token_id`, `all_special_ids`, and `apply_chat_template` for conversations.
        options: lengths, and how rows are read.

    Raises:
        ConfigError: the tokenizer has no EOS token, or no chat template although a conversation needs one.
        RowError: the template refuses a conversation, or the prompt of text with template markers cannot be found.
    """

    def __init__(self, tokenizer: Any, options: PairOptions | None = None) -> None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            missing = "the tokenizer has no EOS token, so the model would never learn where an answer ends"
            if getattr(tokenizer, "chat_template", None) is not None:
                raise ConfigError(f"{missing}: set tokenizer.eos_token to the token that ends answers in its template")
            raise ConfigError(
                f"{missing}: set tokenizer.eos_token to a token of its vocabulary, or call "
                "orpo_plugins.setup_chat_format"
            )
        self.tokenizer = tokenizer
        self.options = PairOptions() if options is None else options
        self._texts = TextBuilder(tokenizer)
        self._check_template()
        self._special_ids = frozenset([*special_tokens(tokenizer), IGNORE_INDEX])

    def __call__(self, preference: Preference) -> BuiltPair | Dropped:
        """Builds one pair."""
        if reason := self._texts.unusable(preference):
            return Dropped(reason=reason)
        self._check_prompt(preference)
        texts = self._texts(preference)
        if not texts.prompt.strip():
            return Dropped(reason="empty prompt")
        if texts.chosen == texts.rejected:
            return Dropped(reason="chosen equals rejected")
        if not self.options.repeat_eos:
            texts = texts.until(self.tokenizer.convert_ids_to_tokens([self.tokenizer.eos_token_id])[0])
        answers = self._tokens(texts)[: 1 if preference.rejected is None else 2]
        return self._with_eos_and_fit(
            answers,
            repaired=texts.repaired,
            restated=texts.restated,
            strings_joined=texts.strings_joined,
            strings_templated=texts.strings_templated,
        )

    def _with_eos_and_fit(self, answers: Sequence[PromptAndAnswer], **flags: bool) -> BuiltPair | Dropped:
        if empty := self._empty_answer(answers):
            return Dropped(reason=f"the {empty} answer is empty after tokenization")
        return self.fit(*map(self._with_eos, answers), **flags)

    def _empty_answer(self, answers: Sequence[PromptAndAnswer]) -> str | None:
        """The name of the first answer that has no token with a label, special tokens not counted."""
        named = zip(("chosen", "rejected"), answers, strict=False)
        return next((name for name, answer in named if self._special_ids.issuperset(answer.labels)), None)

    def _check_template(self) -> None:
        if self.options.template_strings and getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "template_strings=True needs a chat template, but the tokenizer has none: set tokenizer.chat_template, "
                "or call model, tokenizer = orpo_plugins.setup_chat_format(model, tokenizer) first"
            )

    def _check_prompt(self, preference: Preference) -> None:
        """Refuses to template strings without a prompt column.

        The common beginning of both answers would become the user's message, and may contain the start of an answer.
        """
        if self.options.template_strings and isinstance(preference.prompt, str):
            if self._texts.is_templated(preference):
                return
            raise RowError(
                "template_strings=True, but the row has no prompt column, so the end of the user's message is not "
                "known: give the prompt a column of its own, or set template_strings=False"
            )

    # ---- tokens

    def _tokens(self, texts: Texts) -> tuple[PromptAndAnswer, PromptAndAnswer]:
        prompt, chosen, rejected = self._encode([texts.prompt, texts.chosen, texts.rejected])
        return (
            self._answer(prompt, chosen, texts.chosen, texts.chosen_spans),
            self._answer(prompt, rejected, texts.rejected, texts.rejected_spans),
        )

    def _answer(self, prompt: list[int], ids: list[int], text: str, spans: list[Span] | None) -> PromptAndAnswer:
        """Splits the `ids` of a complete text.  `spans`: its assistant's turns; None: all behind the prompt."""
        start, labels = boundary(prompt, ids), ids
        if spans is not None:
            only_last = self.options.train_on == "last"
            token_spans = self._token_spans(text, spans[-1:] if only_last else spans, ids)
            start = token_spans[0][0] if only_last else start
            labels = labels_inside(token_spans, ids)
        return self._with_bos(PromptAndAnswer(ids[:start], ids[start:], labels[start:]))

    def _token_spans(self, text: str, spans: list[Span], ids: list[int]) -> list[Span]:
        """The spans of a text as spans of its tokens `ids`."""
        beginnings = self._encode([text[:cut] for span in spans for cut in span])
        cuts = [boundary(beginning, ids) for beginning in beginnings]
        return list(zip(cuts[::2], cuts[1::2], strict=True))

    def _with_bos(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None or answer.prompt[:1] == [bos]:
            return answer
        return answer._replace(prompt=[bos, *answer.prompt])

    def _with_eos(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        """Appends EOS, unless it is the last token already."""
        eos = self.tokenizer.eos_token_id
        if answer.ids[-1] == eos:
            return answer
        label = eos if answer.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
        return answer._replace(ids=[*answer.ids, eos], labels=[*answer.labels, label])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: no warning about texts above the model's limit, because `fit` truncates them.
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    # ---- length

    def fit(self, *uncut: PromptAndAnswer, **flags: bool) -> BuiltPair | Dropped:
        """Truncates a chosen and a rejected answer, or a chosen one alone, to the lengths of `PairOptions`.

        1. Cut each answer to `max_completion_length`.
        2. Cut the prompts to `max_prompt_length`, and further until the longer answer fits into `max_length`.  The
           prompts keep at least half of `max_length`.
        3. Cut each answer to what its prompt leaves of `max_length`.

        `flags` are passed on to `BuiltPair`.
        """
        options = self.options
        limit = options.max_completion_length
        cut = [answer._replace(ids=answer.ids[:limit], labels=answer.labels[:limit]) for answer in uncut]
        prompts = self._cut_prompts([answer.prompt for answer in cut], self._prompt_limit(cut))
        prompt_truncated = any(len(new) < len(old.prompt) for new, old in zip(prompts, cut, strict=True))
        for i, (answer, prompt) in enumerate(zip(cut, prompts, strict=True)):
            left = None if options.max_length is None else max(0, options.max_length - len(prompt))
            cut[i] = PromptAndAnswer(prompt, answer.ids[:left], answer.labels[:left])
        if empty := self._empty_answer(cut):
            return Dropped(reason=f"truncation leaves no token of the {empty} answer")
        return built_pair(uncut, cut, prompt_truncated=prompt_truncated, **flags)

    def _prompt_limit(self, answers: Sequence[PromptAndAnswer]) -> int:
        """The number of tokens that the longer prompt may keep."""
        longest = max(len(answer.prompt) for answer in answers)
        limit = longest if self.options.max_prompt_length is None else min(longest, self.options.max_prompt_length)
        if self.options.max_length is not None:
            left = self.options.max_length - max(len(answer.ids) for answer in answers)
            limit = min(limit, max(left, self.options.max_length // 2))
        return limit

    def _cut_prompts(self, prompts: list[list[int]], limit: int) -> list[list[int]]:
        """Cuts the same number of tokens from both prompts, so their common tokens stay the same."""
        excess = max(len(prompt) for prompt in prompts) - limit
        if excess <= 0:
            return prompts
        if self.options.truncation_mode == "keep_start":
            return [prompt[:limit] for prompt in prompts]
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is not None and all(prompt[:1] == [bos] for prompt in prompts):
            return [[bos, *prompt[1 + excess :]] for prompt in prompts]
        return [prompt[excess:] for prompt in prompts]


def built_pair(uncut: Sequence[PromptAndAnswer], cut: Sequence[PromptAndAnswer], **flags: bool) -> BuiltPair | Dropped:
    """The pair of a chosen and a rejected answer after truncation (`cut`), or of a chosen answer alone.

    `flags` are the fields of `BuiltPair` that `uncut` and `cut` do not show.
    """
    sequences = [token_sequence(answer) for answer in cut]
    if len(cut) == 1:
        sequences.append(TokenSequence(input_ids=[], labels=[]))
    elif sequences[0].input_ids == sequences[1].input_ids:
        return Dropped(reason="chosen equals rejected after truncation")
    shorter = [len(new.ids) < len(old.ids) for new, old in zip(cut, uncut, strict=True)]
    return BuiltPair(
        pair=Pair(chosen=sequences[0], rejected=sequences[1]),
        chosen_truncated=shorter[0],
        rejected_truncated=shorter[-1] and len(cut) == 2,
        **flags,
    )


def boundary(beginning: list[int], ids: list[int]) -> int:
    """The index of the first token of `ids` that differs from `beginning`, the tokens of the beginning of the text."""
    shortest = min(len(beginning), len(ids))
    if beginning[:shortest] == ids[:shortest]:
        return shortest
    return next(i for i in range(shortest) if beginning[i] != ids[i])


def labels_inside(spans: Sequence[Span], ids: list[int]) -> list[int]:
    """The tokens inside the spans, and -100 outside of them."""
    inside = {i for start, end in spans for i in range(start, end)}
    return [token if i in inside else IGNORE_INDEX for i, token in enumerate(ids)]


def token_sequence(answer: PromptAndAnswer) -> TokenSequence:
    return TokenSequence(
        input_ids=answer.prompt + answer.ids, labels=[IGNORE_INDEX] * len(answer.prompt) + answer.labels
    )
