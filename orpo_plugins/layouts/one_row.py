"""Layouts that pay for each token once: one row, no padding, attention by spans instead of masks.

*packed*: every sequence after the other, positions restarting with each.

*shared*: `[prompt | chosen | rejected]` per pair.  Both answers attend to the one copy of the prompt, and the
rejected answer's positions continue from the prompt as if the chosen one were not there.  What is shared is the
longest common token prefix of the two sequences, whatever the labels say: prompts that differ (truncated
differently, another history) share less, and answers that begin alike share more.

A model learns of the spans through one more keyword, `SPANS`, that reaches the registered attention function
(`orpo_plugins/layouts/attention.py`).  A model that would drop it silently must not run in these layouts, see
`orpo_plugins/layouts/support.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from orpo_plugins.hooks.types import Layout, Pair
from orpo_plugins.layouts.padded import Target, nll_targets, sequence_targets

SPANS = "orpo_spans"
"""The keyword argument under which a batch carries its `Spans`."""


class Span(NamedTuple):
    """Rows that attend causally to themselves and, before that, to all rows of a context."""

    start: int
    """First row."""
    length: int
    """Rows."""
    context_start: int
    """First row of the context, the first rows of the span that starts there (a shared prompt)."""
    context_length: int
    """Rows of the context; 0 for a sequence that stands alone (`context_start` is any span's then)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """All spans of a batch, in the order of their rows, which they cover without gaps.

    Kept on the host as integers: slicing by them never waits for a device.  Data loaders and trainers pass the
    object on untouched.
    """

    spans: tuple[Span, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What attention functions derive from the spans (masks, offsets), once per batch instead of once per layer."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: its tensors may be on a device, and are made again from the spans."""
        return {"spans": self.spans, "cache": {}}

    def derived(self, key: Any, make: Callable[[], Any]) -> Any:
        """The cached value for `key`, made on first use."""
        if key not in self.cache:
            with torch.inference_mode(False):  # what is made in that mode could not be used for training any more
                self.cache[key] = make()
        return self.cache[key]


def layouts() -> list[Layout]:
    """The two layouts of this module."""
    common: dict[str, Any] = {
        "unsupported": _unsupported,
        "prepare": _prepare,
        "forward_context": _forward_context,
        "keyword": SPANS,
    }
    return [
        Layout(name="packed", collate=collate_packed, priority=10, **common),
        Layout(name="shared", collate=collate_shared, priority=20, **common),
    ]


def collate_packed(pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
    """[1, S] with S the sum of all sequence lengths; see `LayoutFunction` for the keys."""
    del pad_token_id  # nothing is padded
    batch = _OneRow(num_pairs=len(pairs))
    for index, pair in enumerate(pairs):
        for sequence, number, term in ((pair.chosen, index, nll_over), (pair.rejected, len(pairs) + index, None)):
            start = len(batch.input_ids)
            batch.targets += sequence_targets(sequence, start, number, nll_over=term)
            batch.add(sequence.input_ids)
    return batch.tensors()


def collate_shared(pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
    """[1, S] with every shared prefix counted once; see `LayoutFunction` for the keys.

    A row that ends the shared prefix predicts the first token of both rests: two targets of `labels` name it.
    """
    del pad_token_id
    batch = _OneRow(num_pairs=len(pairs))
    for index, pair in enumerate(pairs):
        chosen, rejected = pair.chosen, pair.rejected
        start, shared = len(batch.input_ids), common_prefix(chosen.input_ids, rejected.input_ids)
        batch.targets += sequence_targets(chosen, start, index, nll_over=nll_over)
        batch.add(chosen.input_ids)
        # Row p of the rejected sequence is row p of the pair up to the shared prefix and follows the chosen rest after.
        jump = len(chosen.input_ids) - shared
        batch.targets += [
            (start + row if row < shared else start + row + jump, token, number, terms)
            for row, token, number, terms in sequence_targets(rejected, 0, len(pairs) + index, nll_over=None)
        ]
        batch.add(rejected.input_ids[shared:], context_start=start, context_length=shared)
    return batch.tensors()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences have in common."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


@dataclass(kw_only=True)
class _OneRow:
    """A batch of one row while it grows."""

    num_pairs: int
    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def add(self, tokens: Sequence[int], *, context_start: int = 0, context_length: int = 0) -> None:
        if not tokens:
            return
        self.spans.append(Span(len(self.input_ids), len(tokens), context_start, context_length))
        self.position_ids += range(context_length, context_length + len(tokens))
        self.input_ids += tokens

    def tensors(self) -> dict[str, Any]:
        return {
            "input_ids": torch.tensor([self.input_ids], dtype=torch.long),
            "position_ids": torch.tensor([self.position_ids], dtype=torch.long),
            SPANS: Spans(spans=tuple(self.spans)),
            "labels": torch.tensor(self.targets, dtype=torch.long).reshape(-1, 4),
            "shift_labels": nll_targets(self.targets, 2 * self.num_pairs),
        }


# transformers is imported when a model is at hand, not with this module.


def _unsupported(model: torch.nn.Module) -> str | None:
    from orpo_plugins.layouts import support

    return support.unsupported(model)


def _prepare(model: torch.nn.Module) -> None:
    from orpo_plugins.layouts import attention

    attention.prepare(model)


def _forward_context(model: torch.nn.Module) -> AbstractContextManager[Any]:
    from orpo_plugins.layouts import attention

    return attention.without_masks(model)
