"""Pairs for encoder-decoder models: prompt and answer are tokenized separately, each with its special tokens.

Without truncation, ids and labels are those of TRL's ORPOTrainer (1.9 to 1.16).  Answers that `max_completion_length`
cuts are the same as in TRL, too: they keep their EOS at the end, which the answers of a decoder do not.
"""

from typing import Any

from orpo_plugins.data.chat_templates import Texts
from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder, PromptAndAnswer, Span, built_pair, labels_inside


class EncoderDecoderPairBuilder(PairBuilder):
    """`PairBuilder` for `PairOptions(encoder_decoder=True)`."""

    def _tokens(self, texts: Texts) -> tuple[PromptAndAnswer, PromptAndAnswer]:
        return (
            self._separate_answer(texts.chosen, len(texts.prompt), texts.chosen_spans),
            self._separate_answer(texts.rejected, len(texts.prompt), texts.rejected_spans),
        )

    def _separate_answer(self, text: str, start: int, spans: list[Span] | None) -> PromptAndAnswer:
        if spans and self.options.train_on == "last":
            spans, start = spans[-1:], spans[-1][0]
        prompt, ids = self._encode([text[:start], text[start:]])
        if spans is None:
            return PromptAndAnswer(prompt, ids, ids)
        spans = [(max(0, begin - start), max(0, end - start)) for begin, end in spans]  # in the answer's own text
        return PromptAndAnswer(prompt, ids, labels_inside(self._token_spans(text[start:], spans, ids), ids))

    def _with_eos(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        """Appends EOS if the tokenizer has not added it."""
        last = answer.ids[len(answer.ids) - self._special_at_ends(answer.ids)[1] :]
        return answer if self.tokenizer.eos_token_id in last else super()._with_eos(answer)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return encoded_alone(self.tokenizer, texts)

    # ---- length

    def fit(self, *uncut: PromptAndAnswer, **flags: bool) -> BuiltPair | Dropped:
        """Truncates prompts and answers, each to a limit of its own (see `PairOptions`)."""
        cut = [self._cut(answer) for answer in uncut]
        if not all(answer.prompt for answer in cut):
            return Dropped(reason="truncation leaves no token of the prompt")
        if empty := self._empty_answer(cut):
            return Dropped(reason=f"truncation leaves no token of the {empty} answer")
        prompt_truncated = any(new.prompt != old.prompt for new, old in zip(cut, uncut, strict=True))
        return built_pair(uncut, cut, prompt_truncated=prompt_truncated, **flags)

    def _cut(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        options = self.options
        prompt = self._kept(answer.prompt, options.max_prompt_length or options.max_length, options.truncation_mode)
        kept = self._kept(answer.ids, options.max_completion_length or options.max_length, "keep_start")
        return PromptAndAnswer(
            [answer.prompt[i] for i in prompt], [answer.ids[i] for i in kept], [answer.labels[i] for i in kept]
        )

    def _kept(self, ids: list[int], limit: int | None, mode: str) -> list[int]:
        """The indices of the tokens that stay: special tokens at both ends, and one end of the text between them."""
        indices = list(range(len(ids)))
        if limit is None or len(ids) <= limit:
            return indices
        before, after = self._special_at_ends(ids)
        left = limit - before - after
        if left <= 0:
            return []
        end = len(ids) - after
        text = indices[before : before + left] if mode == "keep_start" else indices[end - left : end]
        return [*indices[:before], *text, *indices[end:]]

    def _special_at_ends(self, ids: list[int]) -> tuple[int, int]:
        """The number of special tokens before the text, and after it."""
        text = [i for i, token in enumerate(ids) if token not in self._special_ids]
        return (text[0], len(ids) - 1 - text[-1]) if text else (0, len(ids))


def encoded_alone(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of separate texts, with the special tokens that the tokenizer adds.

    A template may have written BOS and EOS as well; they are kept once.
    """
    bos, eos = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    encoded = []
    for ids in map(list, tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]):
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        while ids[-2:] == [eos, eos]:
            ids = ids[:-1]
        encoded.append(ids)
    return encoded
