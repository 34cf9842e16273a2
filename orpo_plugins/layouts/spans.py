"""Spans: which tokens attend to which, in a batch with one row.

A batch of *packed* or *shared* has its `Spans` under the key `SPANS`.  The model passes them on to the attention
function of `layouts/attention.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

DerivedT = TypeVar("DerivedT")

SPANS = "orpo_spans"
"""The key of a batch, and the keyword argument of the model, that hold the `Spans`."""


class Span(NamedTuple):
    """Consecutive tokens that attend causally to each other, and to all tokens of a context that comes before them."""

    start: int
    """Position of the first token in the row."""
    length: int
    """Number of tokens."""
    context_start: int
    """Position of the context's first token, where another span begins (for a shared prompt, the chosen sequence)."""
    context_length: int
    """Number of tokens of the context; 0 for none.  Then `context_start` has no meaning."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """All spans of a batch, in the order of their tokens.  Together they cover the row without gaps.

    They are integers on the host, so no slice waits for a device.  Data loaders and trainers pass the object on
    unchanged.
    """

    spans: tuple[Span, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Masks and offsets that attention functions derive from the spans: once per batch, not once per layer."""

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the cache: its tensors may be on a device, and can be made again from the spans."""
        return {"spans": self.spans, "cache": {}}

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, context included."""
        return max(span.context_length + span.length for span in self.spans)

    def derived(self, key: Any, make: Callable[[], DerivedT]) -> DerivedT:
        """The cached value for `key`; `make` makes it on first use."""
        if key not in self.cache:
            with torch.inference_mode(False):  # tensors that are made in inference mode cannot be used in training
                self.cache[key] = make()
        value: DerivedT = self.cache[key]
        return value
