"""`PairBatches` in a transformers `Trainer`: how many tokens each row costs, and the loader of the batches.

Accelerate deals batches out to ranks in turn and fills up the last ones, which needs batches of one size.  Ours differ
in size, so each rank makes its own share, and Accelerate prepares the loader as for a single process.
"""

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, trainer_utils

from orpo_plugins.data.collator import ORPOCollator
from orpo_plugins.data.dataset import is_tokenized
from orpo_plugins.data.lengths import pair_lengths, token_costs
from orpo_plugins.errors import ConfigError
from orpo_plugins.hooks import plugins
from orpo_plugins.layouts.batches import PairBatches
from orpo_plugins.options import check_batch_options

logger = logging.getLogger(__name__)

_COUNTED_ROWS = 10_000
"""The tokens of an epoch are estimated from this many rows where there are more."""


def has_length(dataset: Any) -> bool:
    """Whether a dataset knows its number of rows, as a stream does not."""
    return trainer_utils.has_length(dataset)


def keep_batches_whole(trainer: Trainer) -> None:
    """Keeps others from cutting a batch along its first dimension: the table of targets belongs to the whole batch.

    Accelerate would cut batches of a stream that one rank reads for all, which is its default, on one rank too.
    DataParallel would as well, which `Trainer` uses where one process sees several GPUs.

    Raises `ConfigError` for `dispatch_batches=True`.
    """
    loading = trainer.accelerator.dataloader_config
    if loading.dispatch_batches:
        raise ConfigError(
            "dispatch_batches=True cuts batches apart between ranks, and ORPO's batches must stay whole: leave it out"
        )
    loading.dispatch_batches = False
    args = trainer.args
    if args.n_gpu > 1:
        logger.warning(
            "torch.nn.DataParallel cannot split ORPO's batches: training on one of %d GPUs. Launch with "
            "`accelerate launch` or `torchrun` to use them all",
            args.n_gpu,
        )
        args._n_gpu = 1
        trainer._train_batch_size = args.train_batch_size  # which was multiplied by the number of GPUs


def check_batches(args: TrainingArguments, dataset: Any) -> None:
    """Raises `ConfigError` where the arguments ask for batches by tokens or by length that cannot be made."""
    limit = getattr(args, "max_tokens_per_batch", None)
    check_batch_options(limit, getattr(args, "step_strategy", "pairs"))
    if dataset is not None and not has_length(dataset):
        _check_stream(args, limit)
    if limit is None:
        return
    if args.auto_find_batch_size:
        raise ConfigError(
            f"auto_find_batch_size looks for the pairs that fit into memory, and max_tokens_per_batch={limit} sets "
            "their number of tokens: leave one of them out"
        )
    if _splits_batches(args):
        raise ConfigError(
            "split_batches=True cuts each batch apart between ranks, and with max_tokens_per_batch each rank makes "
            "batches of its own: leave one of them out"
        )


def _splits_batches(args: TrainingArguments) -> bool:
    return bool(getattr(args.accelerator_config, "split_batches", False))


def _check_stream(args: TrainingArguments, limit: int | None) -> None:
    """Raises `ConfigError` for an option that needs the length of every row, which a stream does not have."""
    for name, value, asked in (
        ("max_tokens_per_batch", limit, limit is not None),
        ("train_sampling_strategy", "group_by_length", args.train_sampling_strategy == "group_by_length"),
    ):
        if asked:
            raise ConfigError(
                f"{name}={value!r} needs the length of every row before training, and the training set is a stream: "
                f"load it whole (without streaming=True), or leave {name} out"
            )


def pair_batches(trainer: Trainer) -> PairBatches | None:
    """The batches that the arguments ask for; None where `Trainer` makes them with its own sampler.

    `Trainer` does so without `max_tokens_per_batch` and `group_by_length`, and for rows of unknown length.

    Raises:
        ConfigError: a row, or the pairs of a step, do not fit into `max_tokens_per_batch`; a stream.
    """
    args = trainer.args
    dataset: Any = trainer.train_dataset
    limit = getattr(args, "max_tokens_per_batch", None)
    grouped = args.train_sampling_strategy == "group_by_length"
    if not has_length(dataset):
        _check_stream(args, limit)
        return None
    if limit is None and not (grouped and not _splits_batches(args)):
        return None
    if not is_tokenized(dataset):
        if limit is not None:
            raise ConfigError(
                f"max_tokens_per_batch={limit} needs the length of every row, and the training set is no longer the "
                "one that the trainer tokenized: pass the rows as train_dataset"
            )
        return None
    lengths, padded = sizes(dataset, trainer.data_collator)
    # Only ranks that see different data: those of tensor parallelism do not.
    ranks = trainer.get_total_train_batch_size(args) // (trainer._train_batch_size * args.gradient_accumulation_steps)
    batches = PairBatches(
        lengths,
        pairs_per_batch=trainer._train_batch_size,
        max_tokens_per_batch=limit,
        step_strategy=getattr(args, "step_strategy", "pairs"),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        group_by_length=grouped,
        padded=padded,
        shuffle=args.train_sampling_strategy != "sequential",
        drop_last=args.dataloader_drop_last,
        seed=args.seed if args.data_seed is None else args.data_seed,
        ranks=ranks,
        rank=args.process_index * ranks // args.world_size,
    )
    _plan(batches, args)
    if limit is not None:
        _log_plan(batches, trainer)
    return batches


def loader(trainer: Trainer, batches: PairBatches) -> DataLoader[Any]:
    """The training loader over these batches, with the arguments' workers, prepared by Accelerate."""
    args, accelerator = trainer.args, trainer.accelerator
    dataset: Any = trainer.train_dataset
    made = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
        worker_init_fn=functools.partial(
            trainer_utils.seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        ),
    )
    prepared = prepare_data_loader(
        made,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types or ()),
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    prepared._is_accelerate_prepared = True
    registered: DataLoader[Any] = accelerator.prepare_data_loader(prepared)
    return registered


def _plan(batches: PairBatches, args: TrainingArguments) -> None:
    """Plans as many epochs as the run will have.  Raises `ConfigError` where an epoch has no batch."""
    if not len(batches):
        raise ConfigError(
            f"dataloader_drop_last leaves no batch: the {len(batches.lengths)} pairs are fewer than one batch of "
            f"{batches.batch_size} on each of {batches.ranks} ranks needs. Lower the batch size, or leave "
            "dataloader_drop_last out"
        )
    epochs = math.ceil(args.num_train_epochs)
    if args.max_steps > 0:
        epochs = math.ceil(args.max_steps / math.ceil(len(batches) / args.gradient_accumulation_steps))
    batches.plan(max(1, epochs))


def _log_plan(batches: PairBatches, trainer: Trainer) -> None:
    if getattr(trainer.args, "nll_normalization", "batch") == "microbatch" and batches.accumulation * batches.ranks > 1:
        logger.warning(
            "nll_normalization='microbatch' averages over batches, and max_tokens_per_batch=%d gives these different "
            "numbers of pairs: nll_normalization='batch' does not depend on how batches are cut",
            batches.max_tokens,
        )
    if not logger.isEnabledFor(logging.INFO):
        return
    tokens = [batches.cost(batch) for batch in batches]
    logger.info(
        "batches of at most %d tokens: %d on each rank per epoch, with %d to %d tokens, %d on average",
        batches.max_tokens,
        len(tokens),
        min(tokens),
        max(tokens),
        sum(tokens) // len(tokens),
    )


# ---- what a row costs


def sizes(dataset: Any, collator: object) -> tuple[list[tuple[int, ...]], bool]:
    """(`PairBatches.lengths`, `PairBatches.padded`) of a tokenized dataset under the collator's layout.

    Another collator than `ORPOCollator` is taken for one of *padded*, which needs the most tokens.
    """
    if not isinstance(collator, ORPOCollator):
        return token_costs(dataset, plugins.layout(plugins.REFERENCE_LAYOUT)), True
    costs = token_costs(dataset, collator.layout, multiple_of=collator.pad_to_multiple_of or 1)
    return costs, collator.layout.pads


@dataclass(frozen=True, kw_only=True)
class EpochTokens:
    """What one epoch costs, on all ranks together."""

    computed: int
    """Tokens that the model computes in the collator's layout."""
    sequences: int
    """Tokens of all sequences without padding; each prompt counts twice, once in each of its two sequences."""
    padded: int
    """Tokens in the layout *padded*, in batches of the trainer's number of pairs and in its order; `computed` where the
    collator's layout pads by itself."""
    exact: bool
    """False where only some rows have been counted."""


def epoch_tokens(trainer: Trainer) -> EpochTokens | None:
    """What an epoch costs, from the lengths of all rows, or of every nth row of a large dataset.

    None where the rows are not tokenized, and for a stream.
    """
    rows: Any = trainer.train_dataset
    if not (isinstance(rows, list) or hasattr(rows, "with_format")) or not has_length(rows) or not len(rows):
        return None  # a stream, or a dataset whose rows may differ each time they are read
    if not is_tokenized(rows):
        return None
    total = len(rows)
    if total > _COUNTED_ROWS:
        picked = range(0, total, -(-total // _COUNTED_ROWS))
        rows = rows.select(picked) if hasattr(rows, "select") else [rows[index] for index in picked]
    costs, pads = sizes(rows, trainer.data_collator)
    sequences = sum(int((lengths.chosen + lengths.rejected).sum()) for lengths in pair_lengths(rows))
    if pads:
        computed = padded = _padded_tokens(costs, trainer)
    else:
        computed = sum(map(sum, costs))
        padded = _padded_tokens(token_costs(rows, plugins.layout(plugins.REFERENCE_LAYOUT)), trainer)
    computed, sequences, padded = (count * total // len(rows) for count in (computed, sequences, padded))
    return EpochTokens(computed=computed, sequences=sequences, padded=padded, exact=len(rows) == total)


def _padded_tokens(widths: list[tuple[int, ...]], trainer: Trainer) -> int:
    """Tokens of an epoch of padded batches of the trainer's number of pairs, on one rank that sees all of them."""
    args = trainer.args
    batches = PairBatches(
        widths,
        padded=True,
        pairs_per_batch=trainer._train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        group_by_length=args.train_sampling_strategy == "group_by_length",
        shuffle=args.train_sampling_strategy != "sequential",
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    return sum(map(batches.cost, batches))
