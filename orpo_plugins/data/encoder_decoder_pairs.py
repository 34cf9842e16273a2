"""Pairs for encoder-decoder models: prompt and answers tokenized apart, each with the tokenizer's special tokens.

On rows that nothing truncates, ids and labels are those of TRL's ORPOTrainer (1.9 to 1.16).  So are answers that
`max_completion_length` cuts: they keep their closing EOS, unlike a decoder's.
"""

from typing import Any

from orpo_plugins.data.chat_templates import Texts
from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder, PromptAndAnswer, boundary, built_pair
from orpo_plugins.targets import IGNORE_INDEX


class EncoderDecoderPairBuilder(PairBuilder):
    """`PairBuilder` where `PairOptions.encoder_decoder` is set."""

    def _tokens(self, texts: Texts) -> tuple[PromptAndAnswer, PromptAndAnswer]:
        return (
            self._own_answer(texts.chosen, len(texts.prompt), texts.chosen_spans),
            self._own_answer(texts.rejected, len(texts.prompt), texts.rejected_spans),
        )

    def _own_answer(self, text: str, start: int, spans: list[tuple[int, int]] | None) -> PromptAndAnswer:
        if spans and self.options.train_on == "last":
            spans, start = spans[-1:], spans[-1][0]
        prompt, ids = self._encode([text[:start], text[start:]])
        if spans is None:
            return PromptAndAnswer(prompt, ids, ids)
        cuts = self._encode([text[start : max(cut, start)] for span in spans for cut in span])
        tokens = [boundary(beginning, ids) for beginning in cuts]
        marked = {i for begin, end in zip(tokens[::2], tokens[1::2], strict=True) for i in range(begin, end)}
        return PromptAndAnswer(prompt, ids, [token if i in marked else IGNORE_INDEX for i, token in enumerate(ids)])

    def _with_eos(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        """EOS where the tokenizer adds none."""
        closing = answer.ids[len(answer.ids) - self._edges(answer.ids)[1] :]
        return answer if self.tokenizer.eos_token_id in closing else super()._with_eos(answer)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return encoded_alone(self.tokenizer, texts)

    # ---- length

    def fit(self, *whole: PromptAndAnswer, **flags: bool) -> BuiltPair | Dropped:
        """Cuts prompt and answers, each to a limit of its own (see `PairOptions`)."""
        cut = [self._cut(answer) for answer in whole]
        for name, answer in zip(("chosen", "rejected"), cut, strict=False):
            if not answer.prompt:
                return Dropped(reason="no room is left for the prompt")
            if self._special_ids.issuperset(answer.labels):
                return Dropped(reason=f"no room is left for the {name} answer")
        prompt_truncated = any(new.prompt != old.prompt for new, old in zip(cut, whole, strict=True))
        return built_pair(whole, cut, prompt_truncated=prompt_truncated, **flags)

    def _cut(self, answer: PromptAndAnswer) -> PromptAndAnswer:
        options = self.options
        prompt = self._places(answer.prompt, options.max_prompt_length or options.max_length, options.truncation_mode)
        kept = self._places(answer.ids, options.max_completion_length or options.max_length, "keep_start")
        return PromptAndAnswer(
            [answer.prompt[i] for i in prompt], [answer.ids[i] for i in kept], [answer.labels[i] for i in kept]
        )

    def _places(self, ids: list[int], limit: int | None, mode: str) -> list[int]:
        """The places that stay: special tokens at both ends, and what there is room for of one end of the text."""
        places = list(range(len(ids)))
        if limit is None or len(ids) <= limit:
            return places
        before, after = self._edges(ids)
        room = limit - before - after
        if room <= 0:
            return []
        end = len(ids) - after
        text = places[before : before + room] if mode == "keep_start" else places[end - room : end]
        return [*places[:before], *text, *places[end:]]

    def _edges(self, ids: list[int]) -> tuple[int, int]:
        """How many special tokens stand before the text and after it."""
        text = [i for i, token in enumerate(ids) if token not in self._special_ids]
        return (text[0], len(ids) - 1 - text[-1]) if text else (0, len(ids))


def encoded_alone(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that stand alone, with the special tokens that the tokenizer adds.

    BOS and EOS are there once, where a template has written them too.
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
