"""A preference becomes a pair of token sequences: template, answer boundary, BOS and EOS, truncation.

The answer's boundary is found in tokens: the whole text is tokenized at once, and the answer begins with the first
token that differs from the prompt's own tokens.  A token that merges the end of the prompt with the beginning of
the answer therefore belongs to the answer, and what the model sees is always the tokenization of the whole text.

On rows that nothing truncates, ids and labels are those of TRL's ORPOTrainer (1.9 to 1.16), with these intended
exceptions: an answer ends with the first EOS (`PairOptions.repeat_eos` ends it as TRL does); user messages inside an
answer of several turns are not labelled; an answer that follows an assistant's turn begins with its own text, not with
the end of that turn; templated answers beside a raw prompt do not repeat it; and where prompt and answer merge over
more than one token of the prompt, all tokens that hold text of the answer are labelled (TRL leaves some out, or gives
up).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from orpo_plugins.data.chat_templates import TextBuilder, Texts, special_tokens
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.hooks.types import Pair, Preference, TokenSequence
from orpo_plugins.options import PairOptions
from orpo_plugins.targets import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class BuiltPair:
    """A pair, and what was done to it."""

    pair: Pair
    prompt_truncated: bool = False
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    repaired: bool = False
    """The answers held the whole conversation beside a raw prompt, which was left out."""
    restated: bool = False
    """Both answers begin with the text of the prompt."""
    strings_joined: bool = False
    """Strings without a template in them, joined as they are."""
    strings_templated: bool = False
    """Strings that the chat template was applied to."""

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
    """A row that is well-formed but teaches nothing."""

    reason: str


class PromptAndAnswer(NamedTuple):
    """One tokenized sequence before truncation, cut where its answer begins."""

    prompt: list[int]
    ids: list[int]
    labels: list[int]
    """As long as `ids`: the token, or -100 for text between the turns of the answer."""


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
            missing = "the tokenizer has no EOS token, so the model would never learn where an answer ends"
            if getattr(tokenizer, "chat_template", None) is not None:
                raise ConfigError(f"{missing}: set tokenizer.eos_token to what its chat template ends an answer with")
            raise ConfigError(
                f"{missing}: set tokenizer.eos_token to a token of its vocabulary, or call "
                "orpo_plugins.setup_chat_format"
            )
        self.tokenizer = tokenizer
        self.options = PairOptions() if options is None else options
        self._write = TextBuilder(tokenizer)
        self._check_template()
        self._special_ids = frozenset([*special_tokens(tokenizer), IGNORE_INDEX])

    def __call__(self, preference: Preference) -> BuiltPair | Dropped:
        """Builds one pair."""
        if reason := self._write.unusable(preference):
            return Dropped(reason=reason)
        self._check_prompt(preference)
        texts = self._write(preference)
        if not texts.prompt.strip():
            return Dropped(reason="empty prompt")
        if texts.chosen == texts.rejected:
            return Dropped(reason="chosen equals rejected")
        if not self.options.repeat_eos:
            texts = texts.until(self.tokenizer.convert_ids_to_tokens([self.tokenizer.eos_token_id])[0])
        answers = self._tokens(texts)[: 1 if preference.rejected is None else 2]
        built = self._fitted(answers, repaired=texts.repaired, restated=texts.restated)
        if isinstance(built, Dropped):
            return built
        return replace(built, strings_joined=texts.strings_joined, strings_templated=texts.strings_templated)

    def _fitted(self, answers: Sequence[PromptAndAnswer], **flags: bool) -> BuiltPair | Dropped:
        for name, answer in zip(("chosen", "rejected"), answers, strict=False):
            if not self._special_ids.issuperset(answer.labels):
                continue
            return Dropped(reason=f"the {name} answer is empty after tokenization")
        return self.fit(*map(self._with_eos, answers), **flags)

    def _check_template(self) -> None:
        if self.options.template_strings and getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "template_strings=True needs a chat template and the tokenizer has none: set tokenizer.chat_template, "
                "or call model, tokenizer = orpo_plugins.setup_chat_format(model, tokenizer) first"
            )

    def _check_prompt(self, preference: Preference) -> None:
        """Raises `RowError` where what the answers share would become a user's message: it may hold their beginning."""
        if self.options.template_strings and isinstance(preference.prompt, str):
            if self._write.is_templated(preference):
                return
            raise RowError(
                "template_strings=True, and the row has no prompt column, so where the user's message ends is not "
                "known: give the prompt a column of its own, or set template_strings=False"
            )

    # ---- tokens

    def _tokens(self, texts: Texts) -> tuple[PromptAndAnswer, PromptAndAnswer]:
        prompt, chosen, rejected = self._encode([texts.prompt, texts.chosen, texts.rejected])
        return (
            self._answer(prompt, chosen, texts.chosen, texts.chosen_spans),
            self._answer(prompt, rejected, texts.rejected, texts.rejected_spans),
        )

    def _answer(
        self, prompt: list[int], ids: list[int], text: str, spans: list[tuple[int, int]] | None
    ) -> PromptAndAnswer:
        start = boundary(prompt, ids)
        if spans is None:
            labels = ids[start:]
        else:
            spans = spans[-1:] if self.options.train_on == "last" else spans
            cuts = self._encode([text[:cut] for span in spans for cut in span])
            tokens = [boundary(beginning, ids) for beginning in cuts]
            start = tokens[0] if self.options.train_on == "last" else start
            marked = {i for begin, end in zip(tokens[::2], tokens[1::2], strict=True) for i in range(begin, end)}
            labels = [token if i in marked else IGNORE_INDEX for i, token in enumerate(ids)][start:]
        return self._with_bos(PromptAndAnswer(ids[:start], ids[start:], labels))

    def _with_bos(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None or answer.prompt[:1] == [bos]:
            return answer
        return answer._replace(prompt=[bos, *answer.prompt])

    def _with_eos(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        """EOS at the end, unless it is the last token already, as it is unless `PairOptions.repeat_eos` is set."""
        eos = self.tokenizer.eos_token_id
        if answer.ids[-1] == eos:
            return answer
        label = eos if answer.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
        return answer._replace(ids=[*answer.ids, eos], labels=[*answer.labels, label])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Not verbose: what is longer than the model's limit is cut below.
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    # ---- length

    def fit(self, *whole: PromptAndAnswer, **flags: bool) -> BuiltPair | Dropped:
        """Cuts a chosen and a rejected answer, or a chosen one alone, to the options' lengths (see `PairOptions`)."""
        options = self.options
        limit = options.max_completion_length
        cut = [answer._replace(ids=answer.ids[:limit], labels=answer.labels[:limit]) for answer in whole]
        room = self._prompt_room(cut)
        prompts = self._cut_prompts([answer.prompt for answer in cut], room)
        prompt_truncated = any(len(new) < len(old.prompt) for new, old in zip(prompts, cut, strict=True))
        for i, (answer, prompt) in enumerate(zip(cut, prompts, strict=True)):
            left = None if options.max_length is None else max(0, options.max_length - len(prompt))
            cut[i] = PromptAndAnswer(prompt, answer.ids[:left], answer.labels[:left])
        for name, answer in zip(("chosen", "rejected"), cut, strict=False):
            if self._special_ids.issuperset(answer.labels):
                return Dropped(reason=f"no room is left for the {name} answer")
        return built_pair(whole, cut, prompt_truncated=prompt_truncated, **flags)

    def _prompt_room(self, answers: Sequence[PromptAndAnswer]) -> int:
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


def built_pair(whole: Sequence[PromptAndAnswer], cut: Sequence[PromptAndAnswer], **flags: bool) -> BuiltPair | Dropped:
    """The pair of answers that were cut to their lengths; of the chosen one alone, a pair without a rejected one.

    `flags` are those of `BuiltPair` that the answers do not show.
    """
    sequences = [token_sequence(answer) for answer in cut]
    if len(cut) == 1:
        sequences.append(TokenSequence(input_ids=[], labels=[]))
    elif sequences[0].input_ids == sequences[1].input_ids:
        return Dropped(reason="chosen equals rejected after truncation")
    shorter = [len(new.ids) < len(old.ids) for new, old in zip(cut, whole, strict=True)]
    return BuiltPair(
        pair=Pair(chosen=sequences[0], rejected=sequences[1]),
        chosen_truncated=shorter[0],
        rejected_truncated=shorter[-1] and len(cut) == 2,
        **flags,
    )


def boundary(beginning: list[int], ids: list[int]) -> int:
    """The first token of `ids` that differs from, or comes after, the tokens of the text's beginning."""
    shortest = min(len(beginning), len(ids))
    if beginning[:shortest] == ids[:shortest]:
        return shortest
    return next(i for i in range(shortest) if beginning[i] != ids[i])


def token_sequence(answer: PromptAndAnswer) -> TokenSequence:
    return TokenSequence(
        input_ids=answer.prompt + answer.ids, labels=[IGNORE_INDEX] * len(answer.prompt) + answer.labels
    )
