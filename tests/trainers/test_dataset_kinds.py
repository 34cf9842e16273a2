"""Datasets as people hold them: tables, columns, several by name, and rows that are handed to an evaluation."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from orpo_plugins import errors, fuse_head
from orpo_plugins.data.dataset import prepare_dataset
from tests.kit import tiny
from tests.kit.stock import losses, stock
from tests.kit.training import logged, trainer

ROWS = tiny.rows(8)
CHATS = tiny.conversations(8)
UNUSABLE = [{"prompt": "refund", "chosen": " gladly", "rejected": " gladly"}] * 2
TOKENIZER = tiny.tokenizer()


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def pandas_frame(rows: list[dict[str, Any]]) -> Any:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    return frame.set_index(frame.index[::-1])  # as after a sort: no row is found by its place


def polars_frame(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("polars").DataFrame(rows)


KINDS = {
    "DataFrame": pandas_frame,
    "polars": polars_frame,
    "lazy polars": lambda rows: polars_frame(rows).lazy(),
    "arrow": lambda rows: pytest.importorskip("pyarrow").Table.from_pylist(rows),
    "columns": columns,
    "columns of arrays": lambda rows: {
        name: pandas_frame(rows)[name] if name == "prompt" else pandas_frame(rows)[name].to_numpy() for name in rows[0]
    },
}


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["strings", "messages"])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_columns_are_read_as_their_rows(kind: str, rows: list[dict[str, Any]]) -> None:
    expected, _ = prepare_dataset(rows, TOKENIZER)
    prepared, report = prepare_dataset(KINDS[kind](rows), TOKENIZER)
    assert list(prepared) == list(expected)
    assert report.rows == len(rows)


def test_single_messages_are_columns_too() -> None:
    rows = [{**row, "chosen": row["chosen"][0], "rejected": row["rejected"][0]} for row in CHATS]
    prepared, _ = prepare_dataset(columns(rows), TOKENIZER)
    assert list(prepared) == list(prepare_dataset(rows, TOKENIZER)[0])


def test_tokenized_columns_stay_as_they_are() -> None:
    prepared, _ = prepare_dataset(ROWS, TOKENIZER)
    again, _ = prepare_dataset(prepared.to_dict(), TOKENIZER)
    assert list(again) == list(prepared)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": ["a", "b"], "chosen": ["c"]}, "columns of the train dataset differ in length: .*'prompt': 2"),
        ({"prompt": [], "chosen": [], "rejected": []}, "the train dataset has no rows"),
        ({"train": ROWS, "test": ROWS}, r"is a dict with the keys 'train', 'test': pass one of them, as dataset\["),
        (DatasetDict(train=Dataset.from_list(ROWS)), r"is a DatasetDict with the keys 'train': .* dataset\['train'\]"),
        (
            IterableDatasetDict({"train": Dataset.from_list(ROWS).to_iterable_dataset()}),
            r"is a IterableDatasetDict with the keys 'train': .* as dataset\['train'\]",
        ),
        ({"a": pandas_frame(ROWS)}, r"is a dict with the keys 'a': pass one of them"),
        ({}, "is a dict with the keys : pass"),
    ],
)
def test_what_is_not_one_dataset_is_refused(data: Any, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        prepare_dataset(data, TOKENIZER)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "polars" not in kind])
def test_the_trainer_takes_the_same_steps_from_every_kind(kind: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, rows=KINDS[kind](ROWS), eval_dataset=KINDS[kind](ROWS[:4]))
    expected = trainer(tmp_path, rows=ROWS, eval_dataset=ROWS[:4])
    for each in (made, expected):
        each.train()
    assert logged(made, "loss") == logged(expected, "loss")
    value = expected.evaluate()["eval_loss"]
    for metrics in (made.evaluate(), made.evaluate(KINDS[kind](ROWS[:4])), expected.evaluate(KINDS[kind](ROWS[:4]))):
        assert metrics["eval_loss"] == value
    assert made.predict(KINDS[kind](ROWS[:4])).predictions.shape == (4, 2)


def test_the_splits_of_a_dataset_dict_are_named_for_training(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:4]))
    with pytest.raises(errors.ConfigError, match=r"keys 'train', 'test': pass one of them, as dataset\['train'\]"):
        trainer(tmp_path, rows=splits)
    trainer(tmp_path, rows=splits["train"]).train()


SEVERAL = {
    "DatasetDict": lambda sets: DatasetDict({name: Dataset.from_list(rows) for name, rows in sets.items()}),
    "IterableDatasetDict": lambda sets: IterableDatasetDict(
        {name: Dataset.from_list(rows).to_iterable_dataset() for name, rows in sets.items()}
    ),
    "DataFrames": lambda sets: {name: pandas_frame(rows) for name, rows in sets.items()},
    "columns": lambda sets: {name: columns(rows) for name, rows in sets.items()},
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("stocked", [False, True])
def test_several_evaluation_sets_are_those_of_a_dict(kind: str, stocked: bool, tmp_path: Path) -> None:
    sets = {"short": ROWS[:3], "long": tiny.rows(4, longest=40)}
    if stocked:
        made = stock(tmp_path)
        made.eval_dataset = SEVERAL[kind](sets)
        fuse_head(made)
    else:
        made = trainer(tmp_path, eval_dataset=SEVERAL[kind](sets), eval_strategy="steps", eval_steps=3)
        made.train()
    metrics, given = made.evaluate(), made.evaluate(SEVERAL[kind](sets))
    for name, rows in sets.items():
        expected = made.evaluate(rows)["eval_loss"]
        assert metrics[f"eval_{name}_loss"] == given[f"eval_{name}_loss"] == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "polars" not in kind])
def test_a_stock_trainer_with_the_fused_head_reads_every_kind(kind: str, tmp_path: Path) -> None:
    made, expected = stock(tmp_path), stock(tmp_path, rows=ROWS)
    made.train_dataset, made.eval_dataset = KINDS[kind](ROWS), KINDS[kind](ROWS[:4])
    expected.eval_dataset = ROWS[:4]
    for each in (made, expected):
        fuse_head(each).train()
    assert losses(made) == losses(expected)
    assert made.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]
    made.train_dataset = {"train": ROWS}
    with pytest.raises(
        errors.ConfigError, match=r"a dict with the keys 'train': pass one of them, as dataset\['train'\]"
    ):
        made.train()


# ---- rows that cannot be used


@pytest.mark.parametrize("stocked", [False, True])
def test_rows_that_are_handed_to_an_evaluation_are_prepared(
    stocked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: Any = fuse_head(stock(tmp_path)) if stocked else trainer(tmp_path)
    rows = [*UNUSABLE, *ROWS[:3]]  # the first batch is unusable as a whole
    expected = made.evaluate(ROWS[:3])["eval_loss"]
    assert made.evaluate(rows)["eval_loss"] == expected
    assert made.evaluate({"mixed": rows})["eval_mixed_loss"] == expected
    assert made.evaluate(Dataset.from_list(rows).to_iterable_dataset())["eval_loss"] == pytest.approx(expected)
    assert made.predict(rows).predictions.shape == (3, 2)
    assert len(made.get_eval_dataloader(rows).dataset) == 3
    made.eval_dataset = rows
    assert made.evaluate()["eval_loss"] == expected
    for name in ("eval", "mixed", "test"):
        assert f"{name}: 3 of 5 rows kept\n  dropped 2: chosen equals rejected: rows 0, 1" in caplog.text
    with pytest.raises(errors.ConfigError, match="no row of the eval dataset can be used"):
        made.evaluate(UNUSABLE)


def test_rows_that_are_tokenized_are_not_touched(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=ROWS[:4])
    before = made.eval_dataset
    made.evaluate()
    assert made.eval_dataset is before
    assert made.get_eval_dataloader(before).dataset is before


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_batch_of_which_nothing_is_left_names_what_takes_such_rows_out(fused: bool, tmp_path: Path) -> None:
    made = stock(tmp_path, rows=[*UNUSABLE, *ROWS])
    if fused:
        fuse_head(made)
    with pytest.raises(
        errors.BatchError, match=r"none of the 2 rows .*prepare_dataset\(rows, tokenizer, collator\.opt"
    ):
        made.train()
    collator = made.data_collator
    made.train_dataset, report = prepare_dataset([*UNUSABLE, *ROWS], collator.tokenizer, collator.options)
    made.train()
    assert report.kept == len(ROWS)
