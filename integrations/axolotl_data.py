"""How the datasets of an Axolotl config become tokenized pairs.

The `type` of a dataset says how its rows are read:

    none, orpo        by our row formats (strings, conversations, ShareGPT, Alpaca: see docs/data.md)
    chat_template     the same, and rows of strings are written with the chat template
    any other         by Axolotl, which makes strings of them

Then the rows are tokenized here, once, and cached below `dataset_prepared_path`.  What happens to a pair longer than
`sequence_len` is decided by Axolotl's `excess_length_strategy`: "drop" (its default), "truncate" or "raise".
"""

import copy
import functools
import hashlib
import inspect
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_plugins import __version__
from orpo_plugins.data.cache import tokenizer_identity
from orpo_plugins.data.chat_id_pairs import gives_chats_as_ids
from orpo_plugins.data.report import PreparationReport
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.integrations.axolotl_arguments import is_ours
from orpo_plugins.integrations.axolotl_wording import yaml_words
from orpo_plugins.options import PairOptions
from orpo_plugins.targets import prompt_length

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger("axolotl.orpo_plugins")

CHAT_TYPES = ("chat_template", "chat_template.default", "orpo.chat_template")
"""Values of a dataset's `type` that write strings with the chat template; the first two do so for `rl: dpo` as well."""
OWN_TYPES = (None, "orpo", *CHAT_TYPES)
"""Values of a dataset's `type` that stand for our row formats."""
COLUMN_KEYS = {
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_system": "system",
    "field_messages": "conversations",
    "field_tools": "tools",
}
"""A dataset's key that names a column: the name by which our row formats know this column."""
LENGTH_STRATEGIES = ("drop", "truncate", "raise")
_SPLITS = ("datasets", "test_datasets")
_ROWS_PER_PROCESS = 1000
"""Starting a second process takes as long as tokenizing this many rows."""


def keep_column_names(cfg: dict[str, Any]) -> None:
    """Copies `field_*` keys of the raw config to `orpo_columns`: Axolotl's dataset schema drops some of them."""
    renamed = {split: [_columns(dataset) for dataset in cfg[split]] for split in _SPLITS if cfg.get(split)}
    if any(any(columns) for columns in renamed.values()):
        cfg["orpo_columns"] = renamed


def _columns(dataset: Mapping[str, Any]) -> dict[str, str]:
    return {COLUMN_KEYS[key]: str(name) for key, name in dataset.items() if key in COLUMN_KEYS and name}


def serve_evaluate() -> None:
    """Makes `axolotl evaluate` read data as `axolotl train` does.

    That command (0.19.0) asks no plugin for datasets.  It gives untokenized rows to `Trainer.evaluate`, which crashes.
    So its loading function is replaced, in the module that calls it.  For configs without this plugin the replacement
    calls the original.
    """
    # `axolotl evaluate` and `preprocess` import this module before any plugin; `axolotl train` asks the plugin instead.
    caller: Any = sys.modules.get("axolotl.common.datasets")
    if caller is not None:
        caller.prepare_preference_datasets = prepare_preference_datasets


def prepare_preference_datasets(cfg: "DictDefault", tokenizer: "Tokenizer") -> tuple[Any, Any]:
    """(train, eval): tokenized by us for a config with `rl: orpo` and the plugin, else loaded by Axolotl."""
    from axolotl.utils.data.rl import prepare_preference_datasets as native

    loader: Callable[..., tuple[Any, Any]] = load if is_ours(cfg) else native
    return loader(cfg, tokenizer)


def dataset_meta(cfg: "DictDefault") -> "TrainDatasetMeta":
    """What a plugin that loads datasets returns to Axolotl: both sets, and the number of steps of the run.

    With steps that are filled by tokens the number is None, because the number of pairs does not tell it: the Trainer
    counts the steps then.
    """
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.loaders import load_tokenizer

    train, evaluation = load(cfg, load_tokenizer(cfg))
    by_tokens = cfg.orpo_step_strategy == "tokens"
    steps = None if by_tokens else math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    return TrainDatasetMeta(train_dataset=train, eval_dataset=evaluation, total_num_steps=steps)


@yaml_words()
def load(cfg: "DictDefault", tokenizer: "Tokenizer") -> tuple[Any, Any]:
    """(train, eval) as tokenized pairs; eval is None without `test_datasets` and `val_set_size`.

    One process tokenizes and saves the pairs; the others wait and read them.

    Raises:
        ConfigError, RowError: name the dataset, row or option and the remedy.
    """
    from axolotl.utils.data.lock import FileLockLoader
    from axolotl.utils.data.shared import create_train_validation_split
    from axolotl.utils.data.utils import deduplicate_and_log_datasets

    Path(cfg.dataset_prepared_path or "last_run_prepared").mkdir(parents=True, exist_ok=True)
    lock = FileLockLoader(cfg)

    def both_splits() -> tuple[Any, Any]:
        evaluation: Any = None
        train = _load_split(cfg, "datasets", tokenizer)
        if cfg.test_datasets:
            evaluation = _load_split(cfg, "test_datasets", tokenizer)
        elif cfg.val_set_size:
            # The schema makes a float of a number of pairs, which the split would refuse.
            size = int(cfg.val_set_size) if cfg.val_set_size >= 1 else cfg.val_set_size
            train, evaluation = create_train_validation_split(train, cfg, size)
        return train, evaluation

    try:
        train, evaluation = lock.load(both_splits)
    finally:
        lock.cleanup()
    if cfg.dataset_exact_deduplication:
        train, evaluation = deduplicate_and_log_datasets(dataset=train, other_dataset=evaluation)
    return train, evaluation


def _load_split(cfg: "DictDefault", split: str, tokenizer: "Tokenizer") -> "Dataset":
    """One split, from the cache where it has been saved there."""
    from axolotl.utils.data.shared import (
        datasets_with_name_generator,
        load_preprocessed_dataset,
        merge_datasets,
        save_preprocessed_dataset,
    )

    key = cache_key(cfg, split, tokenizer)
    if (cached := load_preprocessed_dataset(cfg, key)) is not None:
        return cached
    parts = []
    for index, dataset in enumerate(cfg[split] or []):
        columns = ((cfg.orpo_columns or {}).get(split) or {index: {}})[index]
        for part in datasets_with_name_generator([dataset]):
            parts.append(tokenized(part, cfg, tokenizer, columns=dict(columns), index=index))
    if not parts or not sum(map(len, parts)):
        raise ConfigError(f"no row of {split} is left to train on: the report above says what was dropped and why")
    merged = merge_datasets(parts, cfg)
    if not cfg.skip_prepare_dataset:
        save_preprocessed_dataset(cfg, merged, key, split)
    return merged


def cache_key(cfg: "DictDefault", split: str, tokenizer: "Tokenizer") -> str:
    """A digest of everything that the tokenized rows depend on, with the contents of local files."""
    from axolotl.utils.data.shared import generate_dataset_hash_from_config

    parts = {
        "version": __version__,
        "axolotl": generate_dataset_hash_from_config(cfg, cfg[split], tokenizer.name_or_path),
        "files": [_digest(Path(dataset.path)) for dataset in cfg[split] if dataset.path],
        "tokenizer": tokenizer_identity(tokenizer),
        "encoder_decoder": has_encoder(cfg),
        "keys": {key: value for key, value in cfg.items() if key in _KEYS_IN_CACHE},
    }
    return "orpo-" + hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


_KEYS_IN_CACHE = (
    "excess_length_strategy",
    "orpo_columns",
    "orpo_max_completion_length",
    "orpo_max_prompt_length",
    "orpo_repeat_eos",
    "orpo_sft_rows",
    "orpo_template_strings",
    "orpo_train_on",
    "orpo_truncation_mode",
    "seed",
    "shuffle_merged_datasets",
    "shuffle_before_merging_datasets",
)


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def tokenized(
    dataset: "DictDefault", cfg: "DictDefault", tokenizer: "Tokenizer", *, columns: Mapping[str, str], index: int
) -> "Dataset":
    """One entry of `datasets`, tokenized.  The log says what was cut or dropped."""
    from orpo_plugins.data.dataset import prepare_dataset

    name = f"{dataset.path}" + (f" ({dataset.name})" if dataset.name else "")
    _check_format(dataset, tokenizer)
    rows = raw_rows(dataset, cfg)
    if dataset.type in OWN_TYPES:
        rows = _renamed(rows, columns, name)
    else:
        rows = _native_rows(rows, dataset, cfg, tokenizer, index)
    strategy = length_strategy(cfg)
    options = pair_options(cfg, dataset, truncate=strategy == "truncate")
    processes = cfg.dataset_num_proc if len(rows) > _ROWS_PER_PROCESS else None
    pairs, report = prepare_dataset(rows, _with_template(tokenizer, dataset), options, num_proc=processes, name=name)
    if report.all_whole():  # otherwise `prepare_dataset` has logged it as a warning
        logger.info("%s", report.summary())
    if dataset.type in OWN_TYPES:
        _log_strings(name, report, template=_own_template(dataset) or cfg.chat_template)
    if strategy == "truncate":
        return pairs
    return drop_too_long(pairs, cfg.sequence_len, strategy, name, encoder_decoder=options.encoder_decoder)


def _check_format(dataset: "DictDefault", tokenizer: "Tokenizer") -> None:
    """Raises `ConfigError` for keys that write special tokens as text, where the tokenizer cannot encode these."""
    if not gives_chats_as_ids(tokenizer):
        return
    template = _own_template(dataset)
    keys = {"type": None if dataset.type in OWN_TYPES else dataset.type, "chat_template": template}
    for key, value in keys.items():
        if value:
            raise ConfigError(
                f"dataset {dataset.path!r}: {key}: {value} writes text with special tokens, and this tokenizer of "
                f"mistral-common encodes none in a text: it has a chat format of its own. Leave {key} out"
            )


def raw_rows(dataset: "DictDefault", cfg: "DictDefault") -> "Dataset":
    """The rows of one entry as they are in the file, on the hub or in the bucket."""
    from axolotl.utils.data.shared import load_dataset_with_config

    rows = load_dataset_with_config(dataset, cfg.hf_use_auth_token, streaming=False)
    if isinstance(rows, dict):
        if "train" not in rows:
            raise ConfigError(f"dataset {dataset.path!r} has the splits {', '.join(rows)}: name one with `split:`")
        rows = rows["train"]
    if dataset.shards:
        rows = rows.shard(num_shards=dataset.shards, index=dataset.shards_idx or 0)
    return rows


def _renamed(rows: "Dataset", columns: Mapping[str, str], name: str) -> "Dataset":
    """The rows; columns that `field_*` keys name get the names that our row formats read."""
    for expected, given in columns.items():
        if given not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise ConfigError(f"dataset {name!r} has no column {given!r}, which its field_* keys name; it has {found}")
        if given != expected:
            if expected in rows.column_names:
                rows = rows.remove_columns(expected)
            rows = rows.rename_column(given, expected)
    return rows


def _native_rows(
    rows: "Dataset", dataset: "DictDefault", cfg: "DictDefault", tokenizer: "Tokenizer", index: int
) -> "Dataset":
    """The rows after one of Axolotl's own dataset types: prompt, chosen and rejected, as strings."""
    from axolotl.prompt_strategies.orpo import load as load_type

    if not isinstance(dataset.type, str):
        raise ConfigError(
            f"dataset {dataset.path!r}: a `type` written as a mapping is for supervised training; leave `type` out and "
            f"name the columns with {', '.join(COLUMN_KEYS)} instead"
        )
    transform = load_type(dataset.type, cfg, dataset_idx=index)
    options: dict[str, Any] = {}
    if isinstance(transform, tuple):
        transform, options = transform
    if transform is None:
        keys = ", ".join(f"{key}: {value}" for key, value in _keys_in_place_of_type(rows, dataset, cfg, tokenizer))
        raise ConfigError(
            f"dataset {dataset.path!r}: Axolotl has no type {dataset.type!r} for rl: orpo. Set {keys} in its place: "
            "rows are recognised by their columns, and strings are written with the chat template (without `type` they "
            "are joined as they are)"
        )
    if "tokenizer" in inspect.signature(transform).parameters:
        transform = functools.partial(transform, tokenizer=tokenizer)
    options.pop("remove_columns", None)
    mapped = rows.map(transform, desc=f"Applying {dataset.type}", num_proc=cfg.dataset_num_proc, **options)
    # The type has read other columns already, such as `system`: these must not be read a second time.
    return mapped.select_columns(["prompt", "chosen", "rejected"])


def _keys_in_place_of_type(
    rows: "Dataset", dataset: "DictDefault", cfg: "DictDefault", tokenizer: "Tokenizer"
) -> Iterator[tuple[str, str]]:
    """The keys to set instead of a `type` that Axolotl has for other methods, and not for ORPO."""
    from axolotl.utils.schemas.enums import ChatTemplate

    from orpo_plugins.data.row_formats import likely_renames

    yield "type", CHAT_TYPES[0]
    template = dataset.type.partition(".")[0]
    if not (dataset.chat_template or cfg.chat_template):
        if template in {known.value for known in ChatTemplate}:
            yield "chat_template", template
        elif getattr(tokenizer, "chat_template", None) is None:
            yield "chat_template", "chatml"
    for given, expected in likely_renames(rows[0]) if len(rows) else ():
        yield f"field_{expected}", given


def _log_strings(name: str, report: PreparationReport, *, template: object) -> None:
    """Logs whether strings were written with the chat template; warns where one is set and was not used."""
    if report.strings_templated:
        logger.info("%s: %d rows of strings are written with the chat template", name, report.strings_templated)
    if report.strings_joined and template:
        logger.warning(
            "%s: %d rows of strings are joined as they are, without chat_template: %s. Set orpo_template_strings: true "
            "(or type: %s in this dataset) to write them with it",
            name,
            report.strings_joined,
            getattr(template, "value", template),
            CHAT_TYPES[0],
        )
    elif report.strings_joined:
        logger.info("%s: %d rows of strings are joined as they are", name, report.strings_joined)


def length_strategy(cfg: "DictDefault") -> str:
    """What happens to pairs longer than `sequence_len`: "drop", "truncate" or "raise"."""
    strategy = str(cfg.excess_length_strategy or "drop").lower()
    if strategy not in LENGTH_STRATEGIES:
        raise ConfigError(f"unknown excess_length_strategy {strategy!r}; known: {', '.join(LENGTH_STRATEGIES)}")
    return strategy


def pair_options(cfg: "DictDefault", dataset: "DictDefault", *, truncate: bool) -> PairOptions:
    """How the rows of a dataset become pairs.  `sequence_len` counts here only where longer rows are to be cut."""
    return PairOptions(
        max_length=cfg.sequence_len if truncate else None,
        max_prompt_length=cfg.orpo_max_prompt_length,
        max_completion_length=cfg.orpo_max_completion_length,
        truncation_mode=cfg.orpo_truncation_mode or "keep_end",
        encoder_decoder=has_encoder(cfg),
        sft_rows=bool(cfg.orpo_sft_rows),
        train_on=cfg.orpo_train_on or "all_assistant",
        template_strings=dataset.type in CHAT_TYPES or (bool(cfg.orpo_template_strings) and dataset.type in OWN_TYPES),
        repeat_eos=bool(cfg.orpo_repeat_eos),
    )


def has_encoder(cfg: "DictDefault") -> bool:
    """Whether the model is an encoder-decoder model: its prompts and answers are tokenized apart from each other.

    Raises `ConfigError` where it would be loaded as a causal LM: BART would lose its encoder without an error.
    """
    from axolotl.loaders.utils import load_model_config

    if not getattr(load_model_config(cfg), "is_encoder_decoder", False):
        return False
    if cfg.type_of_model in (None, "AutoModelForCausalLM"):
        raise ConfigError(
            f"{cfg.base_model} is an encoder-decoder model and type_of_model is {cfg.type_of_model!r}: set "
            "type_of_model: AutoModelForSeq2SeqLM"
        )
    return True


def _own_template(dataset: "DictDefault") -> str | None:
    """The dataset's `chat_template`; None where it is that of the tokenizer."""
    name = getattr(dataset.chat_template, "value", dataset.chat_template)
    return None if name in (None, "", "tokenizer_default") else str(name)


def _with_template(tokenizer: "Tokenizer", dataset: "DictDefault") -> "Tokenizer":
    """The tokenizer; a copy with the dataset's own chat template, where the dataset has one."""
    if _own_template(dataset) is None:
        return tokenizer
    from axolotl.utils.chat_templates import get_chat_template

    own = copy.deepcopy(tokenizer)
    own.chat_template = get_chat_template(dataset.chat_template, dataset.chat_template_jinja, tokenizer)
    return own


def drop_too_long(
    pairs: "Dataset", limit: int, strategy: str, name: str, *, encoder_decoder: bool = False
) -> "Dataset":
    """The pairs whose two sequences both fit into `limit` tokens; the log counts the others.

    With an encoder, the limit holds for prompts and for answers separately.

    Raises `RowError` for a pair that does not fit where `strategy` is "raise".
    """
    measure, column = (_longer_part, "labels") if encoder_decoder else (len, "input_ids")
    sides = [map(measure, pairs[f"{side}_{column}"]) for side in ("chosen", "rejected")]
    lengths = list(map(max, zip(*sides, strict=True)))
    too_long = [row for row, length in enumerate(lengths) if length > limit]
    if not too_long:
        return pairs
    longest = max(lengths)
    if strategy == "raise":
        raise RowError(
            f"{name}: {len(too_long)} pairs are longer than sequence_len {limit} (the longest has {longest} tokens): "
            "raise sequence_len, or set excess_length_strategy to truncate or drop"
        )
    logger.warning(
        "%s: dropped %d of %d pairs as longer than sequence_len %d (the longest has %d tokens); "
        "excess_length_strategy: truncate would keep them",
        name,
        len(too_long),
        len(lengths),
        limit,
        longest,
    )
    return pairs.select([row for row, length in enumerate(lengths) if length <= limit])


def _longer_part(labels: list[int]) -> int:
    """The length of the prompt or the answer, whichever is longer."""
    prompt = prompt_length(labels)
    return max(prompt, len(labels) - prompt)
