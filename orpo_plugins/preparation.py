"""Tokenizes a whole dataset once, and reports what was cut, repaired or left out.

    dataset, report = prepare_dataset(rows, tokenizer, PairOptions(max_length=1024))
    print(report.summary())

A row that is *malformed* (a column missing, a value of the wrong type) raises `RowError`; a row that is well-formed
but *unusable* (both answers equal, nothing to learn from) is dropped, counted and reported with its number.
"""

import dataclasses
import inspect
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orpo_plugins
from orpo_plugins import interfaces, pairs, plugins, row_formats, separate_pairs, texts
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.interfaces import TokenSequence
from orpo_plugins.pairs import Answer, BuiltPair, Dropped, PairBuilder, PairOptions
from orpo_plugins.predictions import IGNORE_INDEX, prompt_length
from orpo_plugins.row_formats import parse_row
from orpo_plugins.separate_pairs import EncoderDecoderPairBuilder

logger = logging.getLogger(__name__)

COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
"""The columns of a tokenized row: ids, and labels that are -100 on the prompt."""

NUMBERS = {"weight": 1.0, "margin": 0.0}
"""Optional columns of raw and tokenized rows (see `Pair`), with what a row without them has."""

_FLAGS = (
    "prompt_truncated",
    "chosen_truncated",
    "rejected_truncated",
    "repaired",
    "sft_only",
    "weighted",
    "with_margin",
)
_ENDLESS = 1000
"""So many unusable rows at the start of a stream, and not one usable, are taken for a mistake."""


@dataclass(kw_only=True)
class PreparationReport:
    """What became of a dataset's rows."""

    name: str = "train"
    """How messages call the dataset."""
    rows: int = 0
    """Rows read."""
    kept: int = 0
    """Rows that became pairs."""
    prompt_truncated: int = 0
    """Pairs whose prompt was cut."""
    chosen_truncated: int = 0
    """Pairs whose chosen answer was cut."""
    rejected_truncated: int = 0
    """Pairs whose rejected answer was cut."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers, from 0, by reason."""
    repaired: list[int] = field(default_factory=list)
    """Row numbers of pairs whose answers held the whole conversation beside a raw prompt."""
    sft_only: int = 0
    """Rows without a rejected answer, trained with the NLL alone."""
    weighted: int = 0
    """Rows with a weight other than 1."""
    with_margin: int = 0
    """Rows with a margin other than 0."""

    def add(self, index: int, dropped: str, flags: Mapping[str, bool]) -> None:
        """Counts one row: the reason why it was dropped (empty where it was kept), and the flags of `BuiltPair`."""
        self.rows += 1
        if dropped:
            self.dropped.setdefault(dropped, []).append(index)
            return
        self.kept += 1
        self.prompt_truncated += flags["prompt_truncated"]
        self.chosen_truncated += flags["chosen_truncated"]
        self.rejected_truncated += flags["rejected_truncated"]
        self.sft_only += flags["sft_only"]
        self.weighted += flags["weighted"]
        self.with_margin += flags["with_margin"]
        if flags["repaired"]:
            self.repaired.append(index)

    def clear(self) -> None:
        """Starts again from no rows."""
        self.__init__(name=self.name)  # type: ignore[misc]  # the fields' defaults are written once, above

    def all_whole(self) -> bool:
        """Whether every row was kept as it is, and counts as every other."""
        truncated = self.prompt_truncated + self.chosen_truncated + self.rejected_truncated
        return not (self.dropped or self.repaired or truncated or self.weighted or self.with_margin)

    def summary(self) -> str:
        """The report in words, one line per thing to know."""
        lines = [f"{self.name}: {self.kept} of {self.rows} rows kept"]
        if self.prompt_truncated or self.chosen_truncated or self.rejected_truncated:
            lines.append(
                f"truncated: {self.prompt_truncated} prompts, {self.chosen_truncated} chosen answers, "
                f"{self.rejected_truncated} rejected answers"
            )
        if self.sft_only:
            lines.append(f"no rejected answer, trained with the NLL alone: {self.sft_only} rows")
        if self.weighted or self.with_margin:
            lines.append(
                f"columns 'weight' and 'margin': {self.weighted} rows with a weight, {self.with_margin} with a margin"
            )
        if self.repaired:
            lines.append(
                f"the answers of {len(self.repaired)} rows held the whole conversation beside a prompt column; "
                f"the column was left out there, so that no prompt is trained twice: {_numbers(self.repaired)}"
            )
        lines += [f"dropped {len(rows)}: {reason}: {_numbers(rows)}" for reason, rows in self.dropped.items()]
        return "\n  ".join(lines)


class RowTokenizer:
    """Callable: a raw or tokenized row and its number to `BuiltPair` or `Dropped`."""

    def __init__(self, tokenizer: Any, options: PairOptions) -> None:
        self.builder = (EncoderDecoderPairBuilder if options.encoder_decoder else PairBuilder)(tokenizer, options)

    def __call__(self, row: Mapping[str, Any], index: int | str) -> BuiltPair | Dropped:
        """Raises `RowError` with the row's number for a malformed row."""
        tokenized = isinstance(row, Mapping) and set(COLUMNS) <= set(row)
        preference = None if tokenized else parse_row(row, index, sft_rows=self.builder.options.sft_rows)
        try:
            numbers = {name: _number(row, name) for name in NUMBERS}
            if numbers["weight"] == 0:
                return Dropped(reason="the weight is 0")
            built = self._from_tokens(row) if preference is None else self.builder(preference)
        except RowError as error:
            raise RowError(f"row {index}: {error}") from error
        if numbers == NUMBERS or isinstance(built, Dropped):
            return built
        pair = dataclasses.replace(built.pair, weight=numbers["weight"], margin=numbers["margin"])
        return dataclasses.replace(built, pair=pair)

    def _from_tokens(self, row: Mapping[str, Any]) -> BuiltPair | Dropped:
        chosen, rejected = tokenized_answer(row, "chosen"), tokenized_answer(row, "rejected")
        if self.builder.options.sft_rows and chosen.ids and not (rejected.prompt or rejected.ids):
            return self.builder.fit(chosen)
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer.ids:
                return Dropped(reason=f"the {name} answer is empty")
        if chosen == rejected:
            return Dropped(reason="chosen equals rejected")
        return self.builder.fit(chosen, rejected)


def tokenized_answer(row: Mapping[str, Any], name: str) -> Answer:
    """Reads `<name>_input_ids` and `<name>_labels`, without what `<name>_attention_mask` masks; checks them."""
    ids, labels = _integers(row, f"{name}_input_ids"), _integers(row, f"{name}_labels")
    if len(ids) != len(labels):
        raise RowError(f"{name}_input_ids has {len(ids)} tokens but {name}_labels has {len(labels)}")
    if row.get(f"{name}_attention_mask") is not None:
        mask = _integers(row, f"{name}_attention_mask")
        if len(mask) != len(ids):
            raise RowError(f"{name}_input_ids has {len(ids)} tokens but {name}_attention_mask has {len(mask)}")
        ids = [token for token, seen in zip(ids, mask, strict=True) if seen]
        labels = [token for token, seen in zip(labels, mask, strict=True) if seen]
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token < 0:
            raise RowError(f"{name}_input_ids[{position}] is {token}: token ids are not negative")
        if label not in (token, IGNORE_INDEX):
            raise RowError(
                f"{name}_labels[{position}] is {label} but {name}_input_ids[{position}] is {token}: a label is the "
                f"token at the same position (not shifted), or {IGNORE_INDEX}"
            )
    start = prompt_length(labels)
    return Answer(ids[:start], ids[start:], labels[start:])


def _number(row: Mapping[str, Any], column: str) -> float:
    """The value of a column of `NUMBERS`; its default where the row has none."""
    value = row.get(column)
    if value is None:
        return NUMBERS[column]
    value = value.item() if hasattr(value, "item") else value
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (column == "weight" and value < 0):
        wanted = "a finite number >= 0" if column == "weight" else "a finite number"
        raise RowError(
            f"column {column!r} is {_start(value)}, expected {wanted}: it changes how much the row counts. Rename the "
            "column if it means something else"
        )
    return float(value)


def _integers(row: Mapping[str, Any], column: str) -> list[int]:
    value = row[column]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(token, int) for token in value):
        raise RowError(f"column {column!r} is {_start(value)}, expected a list of token ids")
    return list(value)


def _start(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def tokenized_row(built: BuiltPair, numbers: Iterable[str] | None = None) -> dict[str, Any]:
    """The columns of a tokenized row, and `length`, the tokens of both sequences.

    With the columns of `NUMBERS` that are named, or by default those in which the row differs from others.
    """

    def columns(name: str, sequence: TokenSequence) -> dict[str, list[int]]:
        return {f"{name}_input_ids": sequence.input_ids, f"{name}_labels": sequence.labels}

    pair = built.pair
    length = len(pair.chosen.input_ids) + len(pair.rejected.input_ids)
    if numbers is None:
        numbers = [name for name, default in NUMBERS.items() if getattr(pair, name) != default]
    return {
        **columns("chosen", pair.chosen),
        **columns("rejected", pair.rejected),
        "length": length,
        **{name: getattr(pair, name) for name in numbers},
    }


def prepare_dataset(
    dataset: Any,
    tokenizer: Any,
    options: PairOptions | None = None,
    *,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Any, PreparationReport]:
    """Tokenizes every row.

    Args:
        dataset: `datasets.Dataset` (cached, and tokenized by `num_proc` processes), `datasets.IterableDataset` or any
            other iterable without a length (tokenized as it is read), or a sequence of dicts.  Rows in any registered
            format, or tokenized already.
        tokenizer: see `PairBuilder`.
        options: lengths.
        num_proc: processes, for a `datasets.Dataset`.
        name: how messages call the dataset.

    Returns:
        The dataset with the columns `COLUMNS` and `length`, and the report, which is logged as a warning where rows
        were cut, repaired or dropped.  A sequence becomes a `datasets.Dataset`
        where that package is installed, and a list otherwise.  The report of a stream fills while it is read, as far
        as it is read in this process.

    Raises:
        RowError: a malformed row, by number.
        ConfigError: no row is left, or `dataset` is none of the above.
    """
    rows = RowTokenizer(tokenizer, PairOptions() if options is None else options)
    report = PreparationReport(name=name)
    # A dataset of that package can only be here if the package was imported.
    package = sys.modules.get("datasets")
    if package is not None and isinstance(dataset, package.Dataset):
        prepared = _prepare_mapped(dataset, rows, report, num_proc)
    elif package is not None and isinstance(dataset, package.IterableDataset):
        return _prepare_stream(dataset, rows, report), report
    elif isinstance(dataset, Mapping):
        keys = ", ".join(map(repr, dataset))
        raise ConfigError(f"the {name} dataset is a {type(dataset).__name__} with the keys {keys}: pass one of them")
    elif isinstance(dataset, str) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"the {name} dataset is {_start(dataset)}: pass a datasets.Dataset, an iterable or a list of dicts"
        )
    elif hasattr(dataset, "__len__"):
        prepared = _as_dataset(list(_tokenized(enumerate(_rows_of(dataset)), rows, report)))
    else:
        return _stream(dataset, rows, report), report
    _check_not_empty(report)
    if not report.all_whole():
        logger.warning("%s", report.summary())
    return prepared, report


def _check_not_empty(report: PreparationReport) -> None:
    if report.rows == 0:
        raise ConfigError(f"the {report.name} dataset has no rows")
    if report.kept == 0:
        raise ConfigError(f"no row of the {report.name} dataset can be used. {report.summary()}")


def _rows_of(dataset: Any) -> Iterator[Any]:
    if not hasattr(dataset, "__getitem__"):
        yield from dataset
        return
    # Datasets of torch need not raise the IndexError that ends an iteration by index.
    for index in range(len(dataset)):
        yield dataset[index]


def _tokenized(
    numbered: Iterable[tuple[int, Any]], rows: RowTokenizer, report: PreparationReport
) -> Iterator[dict[str, Any]]:
    """The usable rows, tokenized; counts all of them."""
    for index, row in numbered:
        built = rows(row, index)
        if isinstance(built, Dropped):
            report.add(index, built.reason, {})
        else:
            report.add(index, "", _flags(built))
            yield tokenized_row(built)


def _streamed(
    numbered: Iterable[tuple[int, Any]], rows: RowTokenizer, report: PreparationReport
) -> Iterator[dict[str, Any]]:
    """The same for a stream, which is read once per epoch and may never end."""
    for index, row in numbered:
        if index == 0:
            report.clear()
        yield from _tokenized([(index, row)], rows, report)
        if report.kept == 0 and report.rows == _ENDLESS:
            _check_not_empty(report)


def _flags(built: BuiltPair) -> dict[str, bool]:
    return {flag: getattr(built, flag) for flag in _FLAGS}


def _as_dataset(rows: list[dict[str, Any]]) -> Any:
    """A `datasets.Dataset`, whose columns a Trainer can ask for (lengths, for one); a list without that package."""
    if not rows:
        return rows
    try:
        import datasets
    except ImportError:
        return rows
    numbers = [name for name in NUMBERS if any(name in row for row in rows)]
    rows = [{**{name: NUMBERS[name] for name in numbers}, **row} for row in rows]
    return datasets.Dataset.from_list(rows, features=_features(**dict.fromkeys(numbers, "float32")))


def _features(**more: str) -> Any:
    import datasets

    tokens = {column: datasets.Sequence(datasets.Value("int32")) for column in COLUMNS}
    return datasets.Features(
        {**tokens, "length": datasets.Value("int32"), **{k: datasets.Value(v) for k, v in more.items()}}
    )


def _numbers_of(columns: Iterable[str]) -> list[str]:
    return [name for name in NUMBERS if name in columns]


# ---- datasets.Dataset


class _MapRows:
    """The function given to `Dataset.map`: every row yields a row, so that the cache holds the report too."""

    def __init__(self, rows: RowTokenizer, numbers: list[str]) -> None:
        self.rows, self.numbers = rows, numbers

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        built = self.rows(row, index)
        if isinstance(built, Dropped):
            nothing = {**{c: [] for c in COLUMNS}, "length": 0, **dict.fromkeys(self.numbers, 0.0)}
            return {**nothing, "dropped": built.reason, **dict.fromkeys(_FLAGS, False)}
        return {**tokenized_row(built, self.numbers), "dropped": "", **_flags(built)}


def _prepare_mapped(dataset: Any, rows: RowTokenizer, report: PreparationReport, num_proc: int | None) -> Any:
    if len(dataset) == 0:
        return dataset
    if dataset.format["type"] != "custom":  # a transform of the user's own makes the rows; tensors would not be texts
        dataset = dataset.with_format(None)
    numbers = _numbers_of(dataset.column_names)
    mapped = dataset.map(
        _MapRows(rows, numbers),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_features(dropped="string", **dict.fromkeys(_FLAGS, "bool"), **dict.fromkeys(numbers, "float32")),
        num_proc=None if num_proc is None else min(num_proc, len(dataset)),
        new_fingerprint=_fingerprint(dataset, rows),
        desc=f"Tokenizing {report.name}",
    ).with_format(None)
    kept = []
    outcome = mapped.select_columns(["dropped", *_FLAGS])[:]
    for index, dropped in enumerate(outcome["dropped"]):
        report.add(index, dropped, {flag: outcome[flag][index] for flag in _FLAGS})
        if not dropped:
            kept.append(index)
    mapped = mapped.remove_columns(["dropped", *_FLAGS])
    return mapped if len(kept) == len(mapped) else mapped.select(kept)


def _fingerprint(dataset: Any, rows: RowTokenizer) -> str:
    """A name for the result that stays the same as long as nothing that decides it changes.

    The package's own hash pickles the function with the tokenizer in it, and a fast tokenizer's state changes with
    use: the cache would hardly ever be found again.
    """
    from datasets.fingerprint import Hasher

    modules = [sys.modules[__name__], interfaces, pairs, row_formats, separate_pairs, texts]
    formats = [(row_format.name, _source(row_format.parse)) for row_format in plugins.row_formats()]
    return str(
        Hasher.hash(
            [
                dataset._fingerprint,
                orpo_plugins.__version__,
                [_source(module) for module in modules],
                formats,
                dataclasses.astuple(rows.builder.options),
                _tokenizer_identity(rows.builder.tokenizer),
            ]
        )
    )


def _source(thing: Any) -> str:
    """The code of the file in which something is defined."""
    try:
        return inspect.getsource(inspect.getmodule(thing) or thing)
    except (OSError, TypeError):
        return repr(thing)


def _tokenizer_identity(tokenizer: Any) -> list[Any]:
    """Everything about a tokenizer that decides ids, as plain values."""
    identity: list[Any] = [
        type(tokenizer).__qualname__,
        str(getattr(tokenizer, "chat_template", None)),
        str(getattr(tokenizer, "special_tokens_map", None)),
        tokenizer.all_special_ids,
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        settings = [str(getattr(tokenizer, name, None)) for name in ("added_tokens_decoder", "init_kwargs")]
        return [*identity, sorted(tokenizer.get_vocab().items()), *settings]
    state = json.loads(backend.to_str())
    # These two change with every call that pads or truncates, and no call here does either.
    state["truncation"] = state["padding"] = None
    return [*identity, json.dumps(state, sort_keys=True)]


# ---- streams


class _MapStream:
    """The function given to `IterableDataset.map`, on batches of one row: it may return none."""

    def __init__(self, rows: RowTokenizer, numbers: list[str], report: PreparationReport) -> None:
        self.rows, self.numbers, self.report = rows, numbers, report

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        row = {column: values[0] for column, values in batch.items()}
        tokenized = [NUMBERS | made for made in _streamed([(indices[0], row)], self.rows, self.report)]
        return {column: [made[column] for made in tokenized] for column in (*COLUMNS, "length", *self.numbers)}


def _prepare_stream(dataset: Any, rows: RowTokenizer, report: PreparationReport) -> Any:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    numbers = _numbers_of(columns)
    return dataset.map(
        _MapStream(rows, numbers, report),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=columns,
        features=_features(**dict.fromkeys(numbers, "float32")),
    )


def _stream(dataset: Iterable[Any], rows: RowTokenizer, report: PreparationReport) -> Any:
    """Any other iterable, as a torch dataset that can be read again and again."""
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return _streamed(enumerate(dataset), rows, report)

    return Stream()


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:10]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}{f' and {len(rows) - 10} more' if len(rows) > 10 else ''}"
