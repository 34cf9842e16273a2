"""What a run does before its first step: it checks model, rows and layout, and logs what the layout saves.

A model that is whole is checked before the training loader is made, because batches are cut by the tokens that they
have in the layout.  A model that FSDP or DeepSpeed cuts apart can only run when it is wrapped, which is
after the loader is made.  The collator can still get another layout then: the loader has not started its workers.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from orpo_plugins.data.collator import ORPOCollator
from orpo_plugins.data.dataset import is_tokenized
from orpo_plugins.data.lengths import pair_lengths
from orpo_plugins.errors import BatchError, ConfigError, ModelError
from orpo_plugins.forward import check_vocabulary
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.types import Pair
from orpo_plugins.integrations.hf_loader import epoch_tokens, has_length
from orpo_plugins.kernels.reference import unsupported
from orpo_plugins.layouts.check import check_layout
from orpo_plugins.models.checks import examine, too_few_positions
from orpo_plugins.models.head import in_mode, is_encoder_decoder, output_head
from orpo_plugins.models.state import Examined
from orpo_plugins.models.virtual_tokens import adapter_of, checkpointed, is_in_the_cache, stop_checkpointing
from orpo_plugins.options import ORPOOptions

logger = logging.getLogger(__name__)

_PAIRS = 2
_ROWS = 64
"""The check looks for pairs that can be used among this many rows."""


class BeforeTraining(TrainerCallback):
    """Calls a function after `Trainer` has wrapped the model and before it reads the first batch."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.function()


# ---- what is active


def announce(
    model: nn.Module,
    args: TrainingArguments,
    options: ORPOOptions,
    layout: Layout,
    *,
    nll_over: str,
    passed_over: Mapping[str, str] | None = None,
) -> None:
    """Logs which kernel, layout and third-party plugins are active, and why preferred layouts are not.

    Raises `ConfigError` for a kernel that cannot run here.
    """
    reasons = [f"not {name}: {reason}" for name, reason in (passed_over or {}).items()]
    third_party = plugins.get_plugin_manager().third_party()
    logger.warning(
        "ORPO by orpo-plugins is active: kernel=%s, layout=%s, nll_over=%s, nll_normalization=%s, beta=%g%s",
        expected_kernel(options.kernel, model, args),
        layout.name,
        nll_over,
        options.nll_normalization,
        options.beta,
        "".join(f"; {text}" for text in [*reasons, *(f"plugin {label}" for label in third_party)]),
    )


def expected_kernel(name: str, model: nn.Module, args: TrainingArguments) -> str:
    """The kernel that the first batch will take, found by what the head is now and by the precision of the run.

    Raises `ConfigError` for a kernel that cannot run here.
    """
    weight = getattr(output_head(model), "weight", None)
    if name == "reference":  # the model's own logits, so nobody is asked
        return name
    if not isinstance(weight, Tensor) or weight.ndim != 2 or unsupported(weight, weight):
        return name if name != "auto" else "auto (chosen at the first batch, as lm_head is sharded or offloaded now)"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, weight.dtype)
    vocabulary, width = weight.shape
    stand_ins = plugins.stand_ins(dtype, torch.device(args.device), width=width, vocabulary=vocabulary)
    return plugins.kernel(name, *stand_ins).name


# ---- arguments, model and rows


def check_label_smoothing(args: TrainingArguments) -> None:
    """Raises `ConfigError` for `label_smoothing_factor`, which ORPO's loss has no place for."""
    if args.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, and ORPO's loss smooths no labels: leave it out"
        )


def without_checkpointing(model: nn.Module, args: TrainingArguments) -> None:
    """Turns gradient checkpointing off, and logs it, for an adapter that has its virtual tokens in the cache."""
    if not is_in_the_cache(adapter_of(model)) or not (args.gradient_checkpointing or checkpointed(model)):
        return
    logger.warning(
        "gradient checkpointing is off: it runs layers without the cache, where the adapter has its virtual tokens"
    )
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # the new name since transformers 5.24
        if hasattr(args, name):
            setattr(args, name, False)
    stop_checkpointing(model)


def check_rows(trainer: Trainer, model: nn.Module) -> bool:
    """Examines the model, and compares the longest tokenized row with the number of positions that the model has.

    Returns whether it did.  Rows that are tokenized batch by batch cannot be compared here, nor batches of a user's own
    collator, which may hold more than tokens: `check_model` looks at each batch of these.

    Raises:
        BatchError: a token is outside the model's vocabulary.
        ConfigError: a row is too long; names it, the limit and the option that cuts it.
        ModelError: the model is not causal.
    """
    train: Any = trainer.train_dataset
    collator = trainer.data_collator
    if type(collator) is not ORPOCollator or not _has_tokenized_rows(train):
        return False
    ids = torch.tensor([[*train[0]["chosen_input_ids"], *train[0]["rejected_input_ids"]]])
    check_vocabulary(model, ids)
    ids = ids.to(next(model.parameters()).device)
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast(), in_mode(model, training=True):
        examined = examine(model, {"input_ids": ids})
    evaluated = trainer.eval_dataset if trainer.args.do_eval else None
    others = evaluated if isinstance(evaluated, dict) else {"evaluation": evaluated}
    for name, rows in {"training": train, **others}.items():
        if _has_tokenized_rows(rows):
            _check_longest(rows, name, collator, model, examined)
    return True


def _has_tokenized_rows(rows: Any) -> bool:
    indexed = has_length(rows) and not isinstance(rows, IterableDataset)
    return indexed and len(rows) > 0 and is_tokenized(rows)


def _check_longest(rows: Any, name: str, collator: ORPOCollator, model: nn.Module, examined: Examined) -> None:
    for side in ("encoder_tokens", "tokens"):
        limit = getattr(examined, side)
        if limit is None:
            continue
        longest, tokens = _longest(rows, side, encoder_decoder=is_encoder_decoder(model))
        tokens += -tokens % (collator.pad_to_multiple_of or 1)
        if tokens > limit:
            raise ConfigError(
                f"row {longest} of the tokenized {name} set has {tokens} tokens, "
                f"{too_few_positions(model, side, limit)}"
            )


def _longest(rows: Any, side: str, *, encoder_decoder: bool) -> tuple[int, int]:
    """(row, tokens) of the longest sequence; of an encoder-decoder model, of the longest prompt or answer."""
    longest = []
    for pairs in pair_lengths(rows):
        sequences = torch.stack([pairs.chosen, pairs.rejected])
        if encoder_decoder:
            prompts = torch.stack([pairs.chosen_prompt, pairs.rejected_prompt])
            sequences = prompts if side == "encoder_tokens" else sequences - prompts
        longest.append(sequences.amax(0))
    row = int(torch.cat(longest).argmax())
    return row, int(torch.cat(longest)[row])


# ---- the layout


def checked_layout(trainer: Trainer, model: nn.Module, *, kernel: str, batches_are_planned: bool) -> None:
    """Compares two pairs in the collator's layout with the same pairs in *padded*, computed as in training.

    All ranks come to the same decision.  Under `layout="auto"` a layout that differs is replaced by *padded*.

    Raises:
        ModelError: the layout differs and must not be replaced; the message has the finding.
        ConfigError: no row can be used for the comparison.
    """
    collator = trainer.data_collator
    reference = plugins.layout(plugins.REFERENCE_LAYOUT)
    if not isinstance(collator, ORPOCollator) or collator.layout.name == reference.name:
        return
    if collator.layout.encoder_decoder or reference.unsupported(model):
        return  # nothing to compare with

    def on_any_rank(value: bool) -> bool:
        if trainer.accelerator.num_processes == 1:
            return value
        flag = torch.tensor(float(value), device=trainer.accelerator.device)
        return bool(trainer.accelerator.reduce(flag, reduction="sum") > 0)

    pairs = _first_pairs(trainer.train_dataset, collator)
    if on_any_rank(not pairs):
        raise ConfigError(
            f"none of the first {_ROWS} rows can be used, so layout={collator.layout.name!r} cannot be compared with "
            "'padded' before training: remove rows that cannot be used (prepare_dataset does it and names them), use "
            "layout='padded', or set layout_check=False"
        )
    # The model's own forward enters the autocast only after Accelerate has prepared it.
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        report = check_layout(
            model,
            pairs,
            collator.layout,
            pad_token_id=collator.pad_token_id,
            nll_over=collator.nll_over,
            kernel=kernel,
            on_any_rank=on_any_rank,
        )
    if not on_any_rank(not report.passed):
        logger.info("%s", report.message())
        return
    finding = report.message() if not report.passed else f"{report.message()}, but not with the rows of another rank"
    _go_on_with_padded(trainer, collator, finding, batches_are_planned=batches_are_planned)


def _go_on_with_padded(trainer: Trainer, collator: ORPOCollator, finding: str, *, batches_are_planned: bool) -> None:
    """Replaces the collator's layout.  Raises `ModelError` where the user has chosen it, or batches depend on it."""
    if getattr(trainer.args, "layout", None) != "auto":
        raise ModelError(finding)
    limit = getattr(trainer.args, "max_tokens_per_batch", None)
    if batches_are_planned and limit is not None:
        raise ModelError(
            f"{finding}. layout='auto' cannot go on with 'padded' here, since max_tokens_per_batch={limit} has been "
            f"planned for {collator.layout.name!r} before FSDP or DeepSpeed cut the model: set layout='padded'"
        )
    logger.warning("%s. layout='auto' goes on with 'padded'", finding)
    collator.layout = plugins.layout(plugins.REFERENCE_LAYOUT)


def _first_pairs(dataset: Any, collator: ORPOCollator) -> list[Pair]:
    """The first pairs that can be used.  Pairs with a rejected answer come first: the others share no prompt."""
    paired: list[Pair] = []
    alone: list[Pair] = []
    rows: Iterator[Any]
    if has_length(dataset) and not isinstance(dataset, IterableDataset):
        rows = (dataset[index] for index in range(min(len(dataset), _ROWS)))
    else:
        rows = itertools.islice(dataset, _ROWS)
    for row in rows:
        try:
            (pair,) = collator.pairs([row])
        except BatchError:  # training leaves this row out too, and keeps the other rows of its batch
            continue
        (paired if pair.rejected.input_ids else alone).append(pair)
        if len(paired) == _PAIRS:
            break
    return [*paired, *alone][:_PAIRS]


def log_example(trainer: Trainer) -> None:
    """Logs the first pair that can be used as text, on the main process, once per run.

    A stream may give its first row only once, so there the collator logs a pair of the first batch.
    """
    collator = trainer.data_collator
    rows: Any = trainer.train_dataset
    if not isinstance(collator, ORPOCollator) or not collator.show_example:
        return
    is_stream = isinstance(rows, IterableDataset) or not has_length(rows)
    collator.example_is_logged = not is_stream
    if is_stream or not trainer.is_world_process_zero():
        return
    for pair in _first_pairs(rows, collator)[:1]:
        collator.log_example(pair)


# ---- tokens


def epoch_cost(trainer: Trainer) -> str | None:
    """The number of tokens of an epoch, in words; None where the lengths of the rows are not known beforehand."""
    if not isinstance(trainer.data_collator, ORPOCollator) or (counts := epoch_tokens(trainer)) is None:
        return None
    layout = trainer.data_collator.layout
    text = f"layout={layout.name}: {'' if counts.exact else 'about '}{counts.computed:,} tokens per epoch"
    if layout.pads:
        return f"{text}, {counts.computed - counts.sequences:,} of them padding"
    return f"{text}, {counts.padded:,} as padded in batches of {trainer._train_batch_size} pairs"


def batch_cost(trainer: Trainer, batch: dict[str, Any]) -> str | None:
    """The number of tokens of a batch, in words, for rows that are tokenized batch by batch; waits for no device."""
    if not isinstance(trainer.data_collator, ORPOCollator) or trainer.data_collator.layout.encoder_decoder:
        return None
    layout, pairs = trainer.data_collator.layout, batch["shift_labels"].shape[0] // 2
    text = f"layout={layout.name}: {batch['input_ids'].numel():,} tokens in the first batch, of {pairs} pairs"
    longest = None if layout.pads else layout.longest_sequence(batch)
    return text if longest is None else f"{text}, {2 * pairs * longest:,} as padded"
