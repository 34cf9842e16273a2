"""Spans: which tokens of a batch of one row attend to which.

A batch of *packed* or *shared* carries its `Spans` under the key `SPANS`, which reaches the attention function that
`layouts/attention.py` registers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

SPANS = "orpo_spans"
"""The keyword argument under which a batch carries its `Spans`."""


class Span(NamedTuple):
    """Tokens that attend causally to themselves and, before that, to all tokens of a context."""

    start: int
    """Position of the first token in the batch's one row."""
    length: int
    """Number of tokens."""
    context_start: int
    """Position of the context's first token; the context begins a span of its own (a shared prompt)."""
    context_length: int
    """Tokens of the context; 0 for a sequence that stands alone (`context_start` means nothing then)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """All spans of a batch, in the order of their tokens, which they cover without gaps.

    Kept on the host as integers: slicing by them never waits for a device.  Data loaders and trainers pass the
    object on untouched.
    """

    spans: tuple[Span, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What attention functions derive from the spans (masks, offsets), once per batch instead of once per layer."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: its tensors may be on a device, and are made again from the spans."""
        return {"spans": self.spans, "cache": {}}

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, context included."""
        return max(span.context_length + span.length for span in self.spans)

    def derived(self, key: Any, make: Callable[[], Any]) -> Any:
        """The cached value for `key`, made on first use."""
        if key not in self.cache:
            with torch.inference_mode(False):  # what is made in that mode could not be used for training any more
                self.cache[key] = make()
        return self.cache[key]
