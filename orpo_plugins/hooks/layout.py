"""The base class of layouts: how pairs are arranged for one forward pass, and what that costs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orpo_plugins.hooks.types import Pair


class PairLengths(Protocol):
    """How long B tokenized pairs are; every property is int64 [B]."""

    @property
    def chosen(self) -> Tensor:
        """Tokens of the chosen sequence, prompt and answer."""

    @property
    def rejected(self) -> Tensor:
        """Tokens of the rejected sequence; 0 where there is none."""

    @property
    def shared_prefix(self) -> Tensor:
        """Leading tokens that both sequences have in common."""

    @property
    def chosen_prompt(self) -> Tensor:
        """Tokens of the chosen sequence before the first that has a label."""

    @property
    def rejected_prompt(self) -> Tensor:
        """The same of the rejected sequence."""


class Layout(ABC):
    """A named way to arrange pairs for one forward pass.

    Only `name` and `collate` must be defined.  A layout that stops there is run like *padded* and billed like it.
    """

    name: str
    """For `layout=<name>`."""
    priority: int = 0
    """`layout="auto"` takes the layout of highest priority that supports the model."""
    batch_key: str | None = None
    """A key that only batches of this layout have.  It is needed where `forward_context`, `model_inputs`,
    `unsupported` or `longest_sequence` have to be called for a batch."""
    encoder_decoder: bool = False
    """Whether an encoder reads the prompts: prompts and answers are tokenized apart, each with its special tokens."""
    pads: bool = True
    """Whether sequences are padded.  A batch of n pairs costs 2 * n * (the largest `token_cost` of each column,
    added up) if they are, and the sum of `token_cost` if not."""
    one_sequence_per_row: bool = False
    """Whether row r of `input_ids` [2B, T] is sequence r and nothing but padding, so that `pad_to_multiple_of` may
    widen it."""

    @abstractmethod
    def collate(self, pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
        """The model's inputs (`input_ids`, masks, positions, …), `labels` and `shift_labels`.

        All values are tensors, except keywords of the layout's own that its attention function reads.

        `labels` int64 [N, 4] is the table of `Targets`; the targets of a pair stand together, those of the chosen
        sequence first.  `shift_labels` int64 [2B, L] holds the NLL's target tokens of each sequence and -100
        elsewhere: a stock Trainer counts them for its token normalization, and its first dimension tells B
        without a device sync.
        """

    def unsupported(self, model: nn.Module) -> str | None:
        """Why `model` cannot run in this layout, in words for the log; None where it can."""
        return None

    def prepare(self, model: nn.Module) -> None:  # noqa: B027  # most layouts need nothing of a model
        """Called once per model before its first batch in this layout, to register an attention function, say."""

    def forward_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Entered around every forward pass with a batch of this layout."""
        return nullcontext()

    def model_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's keyword arguments, from those of a batch."""
        return inputs

    def token_cost(self, lengths: PairLengths) -> Tensor:
        """int64 [B, K]: tokens that each pair needs in each of K padded tables; see `pads`."""
        return torch.maximum(lengths.chosen, lengths.rejected)[:, None]

    def longest_sequence(self, inputs: Mapping[str, Any]) -> int | None:
        """Tokens of the longest sequence in `inputs`, padding included; None where a device would have to be asked."""
        positions = inputs.get("position_ids")
        if positions is not None:
            return int(positions.max()) + 1 if positions.device.type == "cpu" else None
        return int(inputs.get("decoder_input_ids", inputs["input_ids"]).shape[-1])
