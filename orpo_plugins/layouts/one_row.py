"""The common part of *packed* and *shared*: all tokens in one row, no padding, spans instead of attention masks.

The model gets the spans as an additional keyword, `SPANS`, and passes it on to the attention function of
`layouts/attention.py`.  A model that would drop the keyword silently must not run in these layouts
(`layouts/support.py`).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orpo_plugins.hooks.layout import Layout
from orpo_plugins.layouts.spans import SPANS, Span, Spans
from orpo_plugins.layouts.target_table import labels_and_shift_labels


class OneRow(Layout):
    """A subclass adds `name`, `priority`, `collate` and `token_cost`."""

    batch_key = SPANS
    pads = False

    # The imports below need transformers, which the module itself must not import.

    def unsupported(self, model: nn.Module) -> str | None:
        from orpo_plugins.layouts import support

        return support.unsupported(model)

    def prepare(self, model: nn.Module) -> None:
        from orpo_plugins.layouts import attention

        attention.prepare(model)

    def forward_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        from orpo_plugins.layouts import attention

        return attention.without_masks(model)

    def longest_sequence(self, inputs: Mapping[str, Any]) -> int:
        spans: Spans = inputs[SPANS]
        return spans.longest_sequence()


@dataclass(kw_only=True)
class RowBuilder:
    """Collects the tokens, positions, spans and targets of a batch with one row."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[Tensor] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)
    """The targets of each sequence: chosen, rejected, chosen, rejected, …"""

    @property
    def length(self) -> int:
        """Tokens so far: the position of the next one."""
        return len(self.input_ids)

    def add(self, tokens: Sequence[int], *, context_start: int = 0, context_length: int = 0) -> None:
        """Appends a span.  Its `position_ids` continue those of its context."""
        if not tokens:
            return
        self.spans.append(Span(self.length, len(tokens), context_start, context_length))
        self.position_ids.append(torch.arange(context_length, context_length + len(tokens)))
        self.input_ids += tokens

    def batch(self) -> dict[str, Any]:
        """The batch for `Layout.collate`: `input_ids` and `position_ids` [1, S], spans, `labels`, `shift_labels`."""
        return {
            "input_ids": torch.tensor([self.input_ids], dtype=torch.long),
            "position_ids": torch.cat(self.position_ids)[None],
            SPANS: Spans(spans=tuple(self.spans)),
            **labels_and_shift_labels(self.tables[::2], self.tables[1::2]),
        }
