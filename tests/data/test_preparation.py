"""A whole dataset at once: what comes out, what is counted, what stops it, and what the cache keeps."""

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch.utils.data import Dataset as TorchDataset

from orpo_plugins.data import cache as dataset_cache
from orpo_plugins.data import dataset as preparation
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.data.pairs import PairBuilder
from orpo_plugins.data.report import PreparationReport
from orpo_plugins.data.row_tokenizer import COLUMNS, RowTokenizer, tokenized_row
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.options import PairOptions
from tests.kit import ROOT
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer, inst_tokenizer

TOKENIZER = chatml_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"prompt": "the quick brown fox", "chosen": " jumps", "rejected": " sleeps", "source": "a"},
    {"prompt": "it", "chosen": " sleeps", "rejected": " sleeps", "source": "a"},
    {"prompt": "my order", "chosen": " will reach you tomorrow, thank you", "rejected": " never", "source": "b"},
    {"prompt": "the dog", "chosen": "", "rejected": " never", "source": "b"},
    {"prompt": "the dog", "chosen": " answers", "rejected": "<|im_end|>", "source": "b"},
    {"prompt": "please", "chosen": " cancel", "rejected": " jumps", "source": "c"},
]
OPTIONS = PairOptions(max_length=8)


def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The expected rows, one by one."""
    read = RowTokenizer(TOKENIZER, OPTIONS)
    built = [read(row, 0) for row in rows]
    return [tokenized_row(pair) for pair in built if not isinstance(pair, preparation.Dropped)]


class Mapped(TorchDataset[dict[str, Any]]):
    """A torch dataset that has no end for `for`."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index % len(ROWS)]


class Streamed:
    """An iterable that can be read twice."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


SOURCES = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "torch dataset": Mapped,
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "Dataset of numpy": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "Dataset with a transform": lambda: datasets.Dataset.from_list([{"i": i} for i in range(len(ROWS))]).with_transform(
        lambda batch: {key: [ROWS[i][key] for i in batch["i"]] for key in ROWS[0]}
    ),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "IterableDataset of a generator": lambda: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
    "iterable": Streamed,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_kind_of_dataset_gives_the_same_rows_and_report(source: Any) -> None:
    prepared, report = prepare_dataset(source(), TOKENIZER, OPTIONS)
    assert list(prepared) == kept(ROWS)
    assert (report.rows, report.kept) == (6, 3)
    assert report.dropped == {
        "chosen equals rejected": [1],
        "the chosen answer is empty": [3],
        "the rejected answer has special tokens only": [4],
    }
    assert (report.prompt_truncated, report.chosen_truncated, report.rejected_truncated) == (0, 1, 0)


@pytest.mark.parametrize("name", ["IterableDataset", "iterable"])
def test_a_stream_is_read_again_and_counted_again(name: str) -> None:
    prepared, report = prepare_dataset(SOURCES[name](), TOKENIZER, OPTIONS)
    assert report.rows == 0
    assert list(prepared) == list(prepared)
    assert (report.rows, report.kept) == (6, 3)


def test_the_columns_are_ids_and_labels_and_the_length_of_both() -> None:
    prepared, _ = prepare_dataset(ROWS, TOKENIZER, OPTIONS)
    assert prepared.column_names == [*COLUMNS, "length"]
    row = prepared[0]
    assert row["length"] == len(row["chosen_input_ids"]) + len(row["rejected_input_ids"])
    assert len(row["chosen_labels"]) == len(row["chosen_input_ids"])


def test_a_list_stays_a_list_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    prepared, _ = prepare_dataset(ROWS, TOKENIZER, OPTIONS)
    assert prepared == kept(ROWS)


def test_several_processes_number_rows_alike() -> None:
    prepared, report = prepare_dataset(datasets.Dataset.from_list(ROWS), TOKENIZER, OPTIONS, num_proc=2)
    assert list(prepared) == kept(ROWS)
    assert report.dropped["the rejected answer has special tokens only"] == [4]


def test_the_cache_is_found_again_and_keeps_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")

    def prepare(tokenizer: Any, options: PairOptions) -> tuple[Any, PreparationReport]:
        rows = datasets.load_dataset(
            "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
        )
        return prepare_dataset(rows, tokenizer, options)

    first, report = prepare(chatml_tokenizer(), OPTIONS)
    used = chatml_tokenizer()
    used(["a fox", "the dog sleeps"], padding=True, truncation=True, max_length=2)  # changes the tokenizer's state
    calls: list[int] = []
    real = RowTokenizer.__call__
    monkeypatch.setattr(
        RowTokenizer, "__call__", lambda self, row, index: calls.append(index) or real(self, row, index)
    )
    again, same_report = prepare(used, OPTIONS)
    assert calls == []
    assert (list(again), same_report) == (list(first), report)
    prepare(used, PairOptions(max_length=9))
    assert len(calls) == len(ROWS)
    used.chat_template = used.chat_template.replace("assistant", "model")
    prepare(used, OPTIONS)
    assert len(calls) == 2 * len(ROWS)


def test_the_name_of_the_result_is_the_same_in_another_process() -> None:
    code = (
        "import datasets\nfrom tests.data import test_preparation as t\n"
        "from orpo_plugins.data.cache import fingerprint\nfrom orpo_plugins.data.row_tokenizer import RowTokenizer\n"
        "builder = RowTokenizer(t.TOKENIZER, t.OPTIONS).builder\n"
        "print(fingerprint(datasets.Dataset.from_dict({'a': [1]}), builder, print))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    builder = RowTokenizer(TOKENIZER, OPTIONS).builder
    here = dataset_cache.fingerprint(datasets.Dataset.from_dict({"a": [1]}), builder, print)
    assert run.stdout.strip() == here


def test_a_tokenizer_is_known_by_what_it_does() -> None:
    makers = [chatml_tokenizer, inst_tokenizer, gpt2_tokenizer]
    identities = [dataset_cache.tokenizer_identity(make()) for make in makers]
    assert identities == [dataset_cache.tokenizer_identity(make()) for make in makers]
    assert len({str(identity) for identity in identities}) == 3


def test_a_tokenizer_without_a_fast_backend_is_known_by_its_vocabulary() -> None:
    class Slow:
        chat_template = special_tokens_map = None
        all_special_ids = (0,)

        def __init__(self, words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

    assert dataset_cache.tokenizer_identity(Slow("ab")) == dataset_cache.tokenizer_identity(Slow("ab"))
    assert dataset_cache.tokenizer_identity(Slow("ab")) != dataset_cache.tokenizer_identity(Slow("ba"))


def test_a_builder_can_be_sent_to_another_process_after_use() -> None:
    builder = RowTokenizer(TOKENIZER, OPTIONS)
    before = builder(ROWS[0], 0)
    assert pickle.loads(pickle.dumps(builder))(ROWS[0], 0) == before
    assert copy.deepcopy(builder)(ROWS[0], 0) == before


# ---- tokenized rows


def test_tokenized_rows_pass_through() -> None:
    prepared, _ = prepare_dataset(ROWS, TOKENIZER, OPTIONS)
    again, report = prepare_dataset(prepared, TOKENIZER, OPTIONS)
    assert list(again) == list(prepared)
    assert (report.rows, report.kept, report.chosen_truncated) == (3, 3, 0)


def tokenized(**changes: Any) -> dict[str, Any]:
    row = {
        "prompt": "ignored",
        "prompt_input_ids": [1, 5],
        "chosen_input_ids": [1, 5, 6, 3],
        "chosen_labels": [-100, -100, 6, 3],
        "rejected_input_ids": [1, 5, 7, 3],
        "rejected_labels": [-100, -100, 7, 3],
    }
    return {**row, **changes}


def test_rows_that_trl_tokenized_and_padded_lose_their_padding() -> None:
    padded = {"chosen_input_ids": [1, 5, 6, 3, 0], "chosen_labels": [-100, -100, 6, 3, -100]}
    row = tokenized(**padded, chosen_attention_mask=[1, 1, 1, 1, 0])
    prepared, _ = prepare_dataset([row], TOKENIZER)
    assert prepared[0]["chosen_input_ids"] == [1, 5, 6, 3]


def test_tokenized_rows_are_cut_to_the_lengths_asked_for() -> None:
    prepared, report = prepare_dataset([tokenized()], TOKENIZER, PairOptions(max_length=3))
    assert prepared[0]["chosen_input_ids"] == [1, 6, 3]
    assert report.prompt_truncated == 1


def test_tokenized_rows_that_teach_nothing_are_dropped() -> None:
    silent, same = (
        tokenized(rejected_labels=[-100] * 4),
        tokenized(rejected_input_ids=[1, 5, 6, 3], rejected_labels=[-100, -100, 6, 3]),
    )
    _, report = prepare_dataset([tokenized(), silent, same], TOKENIZER)
    assert report.dropped == {"the rejected answer is empty": [1], "chosen equals rejected": [2]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_labels": [-100, 6]}, "row 0: chosen_input_ids has 4 tokens but chosen_labels has 2"),
        ({"rejected_attention_mask": [1]}, "row 0: rejected_input_ids has 4 tokens but rejected_attention_mask has 1"),
        (
            {"chosen_labels": [-100, 6, 3, -100]},
            r"row 0: chosen_labels\[1\] is 6 but chosen_input_ids\[1\] is 5: .*not shifted",
        ),
        ({"chosen_input_ids": [1, -5, 6, 3]}, r"row 0: chosen_input_ids\[1\] is -5: token ids are not negative"),
        ({"rejected_labels": "abc"}, "row 0: column 'rejected_labels' is 'abc', expected a list of token ids"),
        ({"rejected_input_ids": None}, "row 0: column 'rejected_input_ids' is None, expected a list of token ids"),
        ({"rejected_labels": [0.5] * 4}, "row 0: column 'rejected_labels' is .0.5, .*, expected a list of token ids"),
    ],
)
def test_tokenized_rows_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        prepare_dataset([tokenized(**changes)], TOKENIZER)


# ---- the report


def test_the_summary_names_reasons_and_rows() -> None:
    templated = "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
    repeated = {"prompt": "the dog", "chosen": f"{templated}it", "rejected": f"{templated}fox", "source": "d"}
    equal = [{"prompt": "Q", "chosen": "A", "rejected": "A"}] * 12
    _, report = prepare_dataset([*ROWS[:3], repeated, *equal], TOKENIZER, PairOptions(max_length=28), name="eval")
    assert report.summary().splitlines() == [
        "eval: 3 of 16 rows kept",
        "  the answers of 1 rows contained the complete conversation, so their prompt column was left out and "
        "no prompt is trained twice: row 3",
        "  dropped 13: chosen equals rejected: rows 1, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 3 more",
    ]


def test_the_summary_counts_what_was_cut() -> None:
    _, report = prepare_dataset(ROWS[:3], TOKENIZER, OPTIONS)
    assert "  truncated: 0 prompts, 1 chosen answers, 0 rejected answers" in report.summary().splitlines()


PROMPT = "Human: please cancel my order Assistant:"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"prompt": PROMPT, "chosen": f"{PROMPT} yes", "rejected": f"{PROMPT} no"},
            "no prompt is trained twice: row 1",
        ),
        (
            {"prompt": (q := "please cancel my order"), "chosen": f"{q}? yes", "rejected": f"{q}? no"},
            "both answers of 1 rows begin with the text of their prompt, so it is trained twice. If the answers "
            "contain the complete text, remove the prompt column; then their common beginning is the prompt: row 1",
        ),
        ({"prompt": PROMPT, "chosen": " it", "rejected": " it"}, "dropped 1: chosen equals rejected: row 1"),
        ({"prompt": "fox " * 1100, "chosen": " it", "rejected": " no"}, "truncated: 1 prompts, 0 chosen"),
        (ROWS[2], None),
    ],
)
def test_what_was_changed_is_told_by_one_warning(
    row: dict[str, Any], text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="orpo_plugins.data.dataset"):
        _, report = prepare_dataset([ROWS[0], row], TOKENIZER)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ([] if text is None else [report.summary()])
    assert text is None or text in messages[0]


# ---- what stops it


@pytest.mark.parametrize("source", ["list", "Dataset"])
def test_a_dataset_of_which_nothing_is_left_is_refused_with_the_reasons(source: str) -> None:
    rows = [ROWS[1], ROWS[3]]
    data = rows if source == "list" else datasets.Dataset.from_list(rows)
    message = (
        "no row of the eval dataset can be used. eval: 0 of 2 rows kept\n"
        "  dropped 1: chosen equals rejected: row 0\n  dropped 1: the chosen answer is empty: row 1"
    )
    with pytest.raises(ConfigError) as caught:
        prepare_dataset(data, TOKENIZER, name="eval")
    assert str(caught.value) == message


def test_a_stream_of_which_nothing_is_left_is_refused_after_a_thousand_rows() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield ROWS[1]

    prepared, _ = prepare_dataset(endless(), TOKENIZER)
    with pytest.raises(ConfigError, match="no row of the train dataset can be used. train: 0 of 1000 rows kept"):
        next(iter(prepared))


@pytest.mark.parametrize("data", [[], datasets.Dataset.from_list([])], ids=["list", "Dataset"])
def test_an_empty_dataset_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="the train dataset has no rows"):
        prepare_dataset(data, TOKENIZER)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ROWS, "test": ROWS}, "the train dataset is a dict with the keys 'train', 'test': pass one of them"),
        ("rows.json", "the train dataset is 'rows.json': pass a datasets.Dataset, an iterable or a list of dicts"),
        (5, "the train dataset is 5: pass a datasets.Dataset"),
    ],
)
def test_what_is_no_dataset_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_dataset(data, TOKENIZER)


@pytest.mark.parametrize("source", ["list", "Dataset", "two processes", "IterableDataset", "iterable"])
def test_a_malformed_row_is_named_by_its_number(source: str) -> None:
    rows = [*ROWS, {**ROWS[0], "rejected": None}]
    made: Any = rows if source == "list" else datasets.Dataset.from_list(rows)
    made = made.to_iterable_dataset() if source == "IterableDataset" else iter(rows) if source == "iterable" else made
    with pytest.raises(RowError, match=r"row 6 \(strings\): column 'rejected' is None"):
        list(prepare_dataset(made, TOKENIZER, num_proc=2 if source == "two processes" else None)[0])


def test_a_conversation_without_a_template_is_refused_before_anything_else() -> None:
    row = {"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    row["rejected"] = [row["chosen"][0], {"role": "assistant", "content": "B"}]
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        prepare_dataset([row], gpt2_tokenizer())


def test_an_error_of_the_template_is_named_by_the_row() -> None:
    row = {"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"}
    with pytest.raises(RowError, match="row 0: the chat template refuses the messages"):
        prepare_dataset([row], inst_tokenizer())


def test_the_modules_of_the_data_import_no_framework() -> None:
    code = (
        "import sys, orpo_plugins.data.collator, orpo_plugins.data.chat_format, orpo_plugins.data.dataset\n"
        "print([m for m in ('transformers', 'datasets', 'trl', 'peft', 'jinja2') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_a_builder_takes_its_defaults() -> None:
    assert PairBuilder(TOKENIZER).options == PairOptions()
