"""`ORPOCollator`: makes a batch from rows of a dataset, raw or tokenized.

Trainer(..., data_collator=ORPOCollator(tokenizer, max_length=1024))       # needs remove_unused_columns=False
"""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from orpo_plugins.data.example import example_text
from orpo_plugins.data.pairs import BuiltPair
from orpo_plugins.data.row_tokenizer import RowTokenizer
from orpo_plugins.errors import BatchError, ConfigError
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.types import Pair
from orpo_plugins.layouts.auto import best_layout
from orpo_plugins.layouts.padded import widened
from orpo_plugins.options import NLLOver, PairOptions, TrainOn, TruncationMode, check_option
from orpo_plugins.targets import with_weights, with_width

logger = logging.getLogger(__name__)

_READ_ONCE = frozenset([*(field.name for field in dataclasses.fields(PairOptions)), "padding_value"])
_SET_ONCE = ("options", "tokenizer")
_FORMATS = "row_formats"


class ORPOCollator:
    """Makes batches from preference rows in any registered format, or from tokenized rows.

    A row that cannot be used (for example, chosen equals rejected) is left out of its batch.  Each reason is logged
    once, and `left_out` counts all such rows.  `prepare_dataset` finds them before training starts.

    Args:
        tokenizer: see `PairBuilder`.  It needs an EOS token.  Without a pad token, EOS pads.
        max_length, max_prompt_length, max_completion_length, truncation_mode: see `PairOptions`.
        layout: "padded" (every decoder can run it), "packed", "shared", "seq2seq" (encoder-decoder models) or a
            plugin's; "auto" takes the layout with the highest priority that `model` can run.
        nll_over: "sequence" (prompt and chosen answer) or "completion" (the chosen answer alone).
        padding_value: token id to pad with; default: the tokenizer's pad token.
        pad_to_multiple_of: rounds the width of *padded* batches up.
        sft_rows: whether a row may have no rejected answer (see `PairOptions`).
        train_on: "all_assistant" or "last", for answers of several turns (see `PairOptions`).
        show_example: whether to log the first pair of the first batch as text.
        template_strings: whether the chat template is applied to rows of strings (see `PairOptions`).
        repeat_eos: whether each answer ends as in TRL, with a second EOS (see `PairOptions`).
        model: the model that will be trained.  `layout="auto"` needs it; a layout that it cannot run is refused.

    Returns (when called on a list of rows):
        The batch that `Layout.collate` describes.  For *padded*, all int64: `input_ids` and `attention_mask` [2B, T],
        chosen sequences first; `labels` [N, 4], or [N, 5] with weights or margins (see `targets.py`); `shift_labels`
        [2B, L].

    Raises:
        ConfigError: an unknown option, `layout="auto"` without a model, a layout that `model` cannot run, or a
            tokenizer without EOS, or without a chat template although there are conversations.
        RowError: a row is malformed; the message has its number in the batch.
        BatchError: no row of a batch can be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = 1024,
        *,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        truncation_mode: TruncationMode = "keep_end",
        layout: str = "padded",
        nll_over: NLLOver = "sequence",
        pad_to_multiple_of: int | None = None,
        padding_value: int | None = None,
        sft_rows: bool = False,
        train_on: TrainOn = "all_assistant",
        show_example: bool = True,
        template_strings: bool = False,
        repeat_eos: bool = False,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.layout = _layout(layout) if model is None else best_layout(layout, model)[0]
        if model is not None:
            self.layout.prepare(model)
        self.options = PairOptions(
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            truncation_mode=truncation_mode,
            encoder_decoder=self.layout.encoder_decoder,
            sft_rows=sft_rows,
            train_on=train_on,
            template_strings=template_strings,
            repeat_eos=repeat_eos,
        )
        self.tokenizer = tokenizer
        self.nll_over = nll_over
        self.pad_to_multiple_of = pad_to_multiple_of
        self.left_out: Counter[str] = Counter()
        self.show_example = show_example
        self.example_is_logged = False
        self._read = RowTokenizer(tokenizer, self.options)
        self.pad_token_id = pad_token_id(tokenizer) if padding_value is None else padding_value
        if self.pad_token_id < 0:
            raise ConfigError(f"padding_value is {self.pad_token_id}: it must be a token id, which is never negative")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch."""
        if not rows:
            raise BatchError("the batch has no rows")
        pairs = self.pairs(rows)
        if self.show_example and not self.example_is_logged and _is_first_process():
            self.log_example(pairs[0])
        batch = self.layout.collate(pairs, pad_token_id=self.pad_token_id, nll_over=self.nll_over)
        weights, margins = [pair.weight for pair in pairs], [pair.margin for pair in pairs]
        if any(weight != 1 for weight in weights) or any(margins):
            batch["labels"] = with_weights(batch["labels"], weights, margins)
        if self.pad_to_multiple_of:
            batch = widened(batch, self.pad_to_multiple_of, self.pad_token_id)
        return {**batch, "labels": with_width(batch["labels"], batch["input_ids"].shape[1])}

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises `ConfigError` for an option that only the constructor reads, and for a value that is not allowed."""
        if name in _READ_ONCE or (name in _SET_ONCE and hasattr(self, name)):
            raise ConfigError(
                f"{name}={value!r} would have no effect on an existing collator: make a new one, "
                f"ORPOCollator(tokenizer, {name}={value!r}, ...)"
            )
        if name == "nll_over":
            check_option(name, value)
        if name == "layout" and isinstance(value, str):
            value = _layout(value)
        if name == "pad_to_multiple_of" and value is not None and (not self.layout.one_sequence_per_row or value < 1):
            raise ConfigError(
                f"pad_to_multiple_of={value!r} needs layout='padded' and a positive number, and the layout is "
                f"{self.layout.name!r}"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the layout and the row formats are replaced by their names."""
        return {**vars(self), "layout": self.layout.name, _FORMATS: [known.name for known in plugins.row_formats()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises `ConfigError` if this process does not have the plugins of the process that sent the collator."""
        here = {
            "layouts": [layout.name for layout in plugins.layouts()],
            "row formats": [known.name for known in plugins.row_formats()],
        }
        for kind, names in (("layouts", [state["layout"]]), ("row formats", state.pop(_FORMATS))):
            missing = [name for name in names if name not in here[kind]]
            if missing or (kind == "row formats" and names != here[kind]):
                raise ConfigError(
                    f"this process knows the {kind} {', '.join(here[kind])}, but the process that started it "
                    f"has {', '.join(names)}: register plugins at the top level of the main script, which workers "
                    "run too, or by an entry point (docs/plugins.md), or set dataloader_num_workers=0"
                )
        vars(self).update(state, layout=plugins.layout(state["layout"]))

    def log_example(self, pair: Pair) -> None:
        """Logs a pair as text.  The next batch then logs none."""
        # A warning, because an info line is often not shown.  The text shows errors that no count of rows shows.
        logger.warning("%s", example_text(pair, self.tokenizer, nll_over=self.nll_over))
        self.example_is_logged = True

    def pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
        """The usable rows as pairs."""
        pairs, reasons = [], []
        for index, row in enumerate(rows):
            built = self._read(row, f"{index} of the batch")
            if isinstance(built, BuiltPair):
                pairs.append(built.pair)
            else:
                reasons.append(built.reason)
        if not pairs:
            counts = ", ".join(f"{reason} ({count})" for reason, count in Counter(reasons).items())
            raise BatchError(
                f"none of the {len(rows)} rows of the batch can be used: {counts}. Remove such rows before training: "
                "rows, report = orpo_plugins.data.dataset.prepare_dataset(rows, tokenizer, collator.options)"
            )
        for reason in reasons:
            if reason not in self.left_out:
                logger.warning(
                    "a row was left out of its batch: %s (logged once for each reason; ORPOCollator.left_out counts "
                    "all rows. prepare_dataset finds such rows before training)",
                    reason,
                )
            self.left_out[reason] += 1
        return pairs


def _layout(name: str) -> Layout:
    if name == "auto":
        raise ConfigError(
            "layout='auto' depends on the model: pass it too, ORPOCollator(tokenizer, layout='auto', model=model), or "
            "leave the layout out for 'padded'"
        )
    return plugins.layout(name)


def _is_first_process() -> bool:
    """Whether this is the first rank, and the first worker of its data loader."""
    worker = get_worker_info()
    return os.environ.get("RANK", "0") == "0" and (worker is None or worker.id == 0)


def pad_token_id(tokenizer: Any) -> int:
    """The id of the pad token, or of EOS if there is none.  The attention mask hides either."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    raise ConfigError("the tokenizer has neither a pad nor an EOS token: set tokenizer.pad_token and eos_token")
