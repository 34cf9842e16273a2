"""Tokenizes a dataset once, and reports which rows were truncated, repaired or dropped.

    dataset, report = prepare_dataset(rows, tokenizer, PairOptions(max_length=1024))
    print(report.summary())

A *malformed* row (a missing column, a value of the wrong type) raises `RowError`.  A well-formed but *unusable* row
(for example, both answers are equal) is dropped, counted and reported with its number.
"""

import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.utils.data

from orpo_plugins.data.cache import fingerprint
from orpo_plugins.data.pairs import BuiltPair, Dropped
from orpo_plugins.data.report import FLAGS, PreparationReport
from orpo_plugins.data.row_tokenizer import COLUMNS, NUMBERS, RowTokenizer, tokenized_row
from orpo_plugins.data.row_values import shortened
from orpo_plugins.errors import ConfigError
from orpo_plugins.options import PairOptions

logger = logging.getLogger(__name__)

_ENDLESS = 1000
"""A stream that begins with this many unusable rows is an error."""


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
        dataset: one of these, with rows in any registered format, or tokenized already:
            a `datasets.Dataset` (cached, and tokenized by `num_proc` processes),
            a `datasets.IterableDataset` or any other iterable without a length (tokenized while it is read),
            a sequence of dicts, or a table (see `as_rows`).
        tokenizer: see `PairBuilder`.
        options: lengths, and how rows are read.
        num_proc: number of processes, for a `datasets.Dataset`.
        name: the name of the dataset in messages.

    Returns:
        The dataset with the columns `COLUMNS` and `length`, and the report.  The report is logged as a warning if rows
        were truncated, repaired or dropped.  A sequence becomes a `datasets.Dataset` if that package is installed, or
        else a list.  The report of a stream counts the rows that this process has read so far.

    Raises:
        RowError: a row is malformed; the message has its number.
        ConfigError: no row is left, or `dataset` is none of the above.
    """
    rows = RowTokenizer(tokenizer, PairOptions() if options is None else options)
    report = PreparationReport(name=name)
    dataset = as_rows(dataset, name)
    # If the package has not been imported, this is none of its datasets.
    package = sys.modules.get("datasets")
    if package is not None and isinstance(dataset, package.Dataset):
        prepared = _prepare_mapped(dataset, rows, report, num_proc)
    elif package is not None and isinstance(dataset, package.IterableDataset):
        return _prepare_stream(dataset, rows, report), report
    elif isinstance(dataset, str) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"the {name} dataset is {shortened(dataset)}: pass a datasets.Dataset, an iterable or a list of dicts"
        )
    elif hasattr(dataset, "__len__"):
        prepared = _as_dataset(list(_tokenized(enumerate(_rows_of(dataset)), rows, report)))
    else:
        return PreparedStream(dataset, rows, report), report
    _check_not_empty(report)
    if not report.all_whole():
        logger.warning("%s", report.summary())
    return prepared, report


def as_rows(dataset: Any, name: str = "train") -> Any:
    """A dataset that can be read row by row.  Tables are converted; any other dataset is returned as it is.

    A pandas or polars DataFrame and a pyarrow Table become a `datasets.Dataset`; a mapping from column to values
    becomes a list.

    Raises:
        ConfigError: `dataset` is a mapping with several datasets, or its columns have different lengths.
    """
    pandas, polars, pyarrow = (sys.modules.get(package) for package in ("pandas", "polars", "pyarrow"))
    if pandas is not None and isinstance(dataset, pandas.DataFrame):
        return _datasets("a DataFrame").Dataset.from_pandas(dataset, preserve_index=False)
    if polars is not None and isinstance(dataset, polars.DataFrame | polars.LazyFrame):
        return _datasets("a DataFrame").Dataset.from_polars(dataset.lazy().collect())
    if pyarrow is not None and isinstance(dataset, pyarrow.Table):
        return _datasets("a Table").Dataset(dataset)
    if not isinstance(dataset, Mapping):
        return dataset
    if are_several(dataset):
        names, first = ", ".join(map(repr, dataset)), next(iter(dataset), "...")
        raise ConfigError(
            f"the {name} dataset is a {type(dataset).__name__} with the keys {names}: pass one of them, as "
            f"dataset[{first!r}]"
        )
    lengths = {column: len(values) for column, values in dataset.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"the columns of the {name} dataset differ in length: {lengths}")
    return [dict(zip(dataset, values, strict=True)) for values in zip(*dataset.values(), strict=True)]


def are_several(dataset: Any) -> bool:
    """Whether a mapping contains several datasets (as a `DatasetDict` does), and not the columns of one."""
    if not isinstance(dataset, Mapping):
        return False
    columns = all(hasattr(values, "__len__") and not isinstance(values, str | Mapping) for values in dataset.values())
    if not columns or not dataset:
        return True
    # A list of mappings is a dataset, or a column of messages.  The names of the columns decide.
    known = "chosen" in dataset or set(COLUMNS) <= set(dataset)
    return not known and any(_is_a_dataset(values) for values in dataset.values())


def _is_a_dataset(values: Any) -> bool:
    """Whether a value of a mapping is a dataset, and not a column."""
    if not isinstance(values, list | tuple):
        return not (hasattr(values, "tolist") and not hasattr(values, "columns"))  # an array or a pandas Series
    return not values or isinstance(values[0], Mapping)


def is_tokenized(dataset: Any) -> bool:
    """Whether the rows have the columns of `prepare_dataset`."""
    if isinstance(dataset, PreparedStream):
        return True
    names = getattr(dataset, "column_names", None)
    if names is None and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset):
        names = dataset[0] if isinstance(dataset[0], Mapping) else None
    return set(COLUMNS) <= set(names or ())


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"reading {what} needs the package datasets: pip install datasets") from error
    return datasets


def _check_not_empty(report: PreparationReport) -> None:
    if report.rows == 0:
        raise ConfigError(f"the {report.name} dataset has no rows")
    if report.kept == 0:
        raise ConfigError(f"no row of the {report.name} dataset can be used. {report.summary()}")


def _rows_of(dataset: Any) -> Iterator[Any]:
    if not hasattr(dataset, "__getitem__"):
        yield from dataset
        return
    # A dataset of torch need not raise IndexError behind its last row, so `iter` might never end.
    for index in range(len(dataset)):
        yield dataset[index]


def _tokenized(
    numbered: Iterable[tuple[int, Any]], rows: RowTokenizer, report: PreparationReport
) -> Iterator[dict[str, Any]]:
    """The usable rows, tokenized.  The report counts all rows."""
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
    """The same for a stream, which is read once per epoch, and may be endless."""
    for index, row in numbered:
        if index == 0:
            report.clear()
        yield from _tokenized([(index, row)], rows, report)
        if report.kept == 0 and report.rows == _ENDLESS:
            _check_not_empty(report)


def _flags(built: BuiltPair) -> dict[str, bool]:
    return {flag: getattr(built, flag) for flag in FLAGS}


def _as_dataset(rows: list[dict[str, Any]]) -> Any:
    """A `datasets.Dataset`, because a Trainer can read one of its columns (`length`); without the package, a list."""
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
    """The function for `Dataset.map`.  Dropped rows stay as empty rows with a reason, so the cache has the report."""

    def __init__(self, rows: RowTokenizer, numbers: list[str]) -> None:
        self.rows, self.numbers = rows, numbers

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        built = self.rows(row, index)
        if isinstance(built, Dropped):
            empty = {**{c: [] for c in COLUMNS}, "length": 0, **dict.fromkeys(self.numbers, 0.0)}
            return {**empty, "dropped": built.reason, **dict.fromkeys(FLAGS, False)}
        return {**tokenized_row(built, self.numbers), "dropped": "", **_flags(built)}


def _prepare_mapped(dataset: Any, rows: RowTokenizer, report: PreparationReport, num_proc: int | None) -> Any:
    if len(dataset) == 0:
        return dataset
    if dataset.format["type"] != "custom":  # a custom transform makes the rows; other formats would make tensors
        dataset = dataset.with_format(None)
    numbers = _numbers_of(dataset.column_names)
    mapped = dataset.map(
        _MapRows(rows, numbers),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_features(dropped="string", **dict.fromkeys(FLAGS, "bool"), **dict.fromkeys(numbers, "float32")),
        num_proc=None if num_proc is None else min(num_proc, len(dataset)),
        new_fingerprint=fingerprint(dataset, rows.builder, _MapRows),
        desc=f"Tokenizing {report.name}",
    ).with_format(None)
    kept = []
    outcome = mapped.select_columns(["dropped", *FLAGS])[:]
    for index, dropped in enumerate(outcome["dropped"]):
        report.add(index, dropped, {flag: outcome[flag][index] for flag in FLAGS})
        if not dropped:
            kept.append(index)
    mapped = mapped.remove_columns(["dropped", *FLAGS])
    return mapped if len(kept) == len(mapped) else mapped.select(kept)


# ---- streams


class _MapStream:
    """The function for `IterableDataset.map`, on batches of one row.  It returns no row if the row is dropped."""

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


class PreparedStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A torch dataset that tokenizes any other iterable, as often as it is read.

    Several data loader workers divide the rows among them.  A torch dataset has to do so itself.
    """

    def __init__(self, dataset: Iterable[Any], rows: RowTokenizer, report: PreparationReport) -> None:
        self.dataset, self.rows, self.report = dataset, rows, report

    def __iter__(self) -> Iterator[dict[str, Any]]:
        numbered: Iterable[tuple[int, Any]] = enumerate(self.dataset)
        worker = torch.utils.data.get_worker_info()
        if worker is not None and not isinstance(self.dataset, torch.utils.data.IterableDataset):
            numbered = itertools.islice(numbered, worker.id, None, worker.num_workers)
        return _streamed(numbered, self.rows, self.report)
