"""Data loader workers that are spawned, not forked: what they need can be sent to them, and their batches are equal."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from orpo_plugins import ORPOCollator, ORPOLoss, errors, fuse_head, hookimpl
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.hooks import Layout, RowFormat
from orpo_plugins.hooks.plugins import get_plugin_manager
from orpo_plugins.layouts.padded import Padded
from orpo_plugins.layouts.spans import SPANS, Spans
from tests.kit import ROOT, tiny
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.encoder_decoder import tokenizer as encoder_decoder_tokenizer
from tests.kit.training import logged, trainer

DECODERS = ("padded", "packed", "shared")
SPAWNED: dict[str, Any] = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn"}
ROWS = [{**row, "weight": 1.0 + index % 2} for index, row in enumerate(tiny.rows(12))]


def collator(layout: str) -> ORPOCollator:
    tokenizer = encoder_decoder_tokenizer() if layout == "seq2seq" else tiny.tokenizer()
    return ORPOCollator(tokenizer, max_length=512, layout=layout)


def assert_equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Spans):
            assert batch[key].spans == value.spans
        else:
            assert torch.equal(batch[key], value), key


@pytest.mark.parametrize("layout", [*DECODERS, "seq2seq"])
def test_a_collator_that_was_sent_makes_the_same_batches(layout: str) -> None:
    made = collator(layout)
    sent = pickle.loads(pickle.dumps(made))
    assert type(sent.layout) is type(made.layout)
    assert_equal(sent(ROWS), made(ROWS))
    assert_equal(pickle.loads(pickle.dumps(made(ROWS))), made(ROWS))


def test_what_attention_derives_from_spans_stays_in_its_process() -> None:
    spans = collator("shared")(ROWS)[SPANS]
    spans.derived("mask", lambda: torch.zeros(3))
    assert pickle.loads(pickle.dumps(spans)).cache == {}
    assert spans.cache


class Stream:
    """An iterable that can be read twice and sent to another process."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


@pytest.mark.parametrize("layout", ["shared", "seq2seq"])  # a worker takes seconds to start, so not each of them
def test_the_trainer_takes_the_same_steps_with_spawned_workers(layout: str, tmp_path: Path) -> None:
    losses = []
    for options in ({}, SPAWNED):
        own: dict[str, Any] = {"layout": layout}
        if layout == "seq2seq":
            own |= {"model": encoder_decoder("t5"), "processing_class": encoder_decoder_tokenizer()}
        made = trainer(tmp_path, rows=Dataset.from_list(ROWS), max_steps=2, **own, **options)
        made.train()
        losses.append(logged(made, "loss"))
    assert losses[1] == losses[0]


@pytest.mark.parametrize("kind", ["tokens", "Dataset", "iterable"])
def test_batches_by_tokens_and_streams_come_from_spawned_workers(kind: str, tmp_path: Path) -> None:
    rows: Any = Stream() if kind == "iterable" else Dataset.from_list(ROWS)
    rows = rows.to_iterable_dataset() if kind == "Dataset" else rows
    options: dict[str, Any] = (
        {"max_tokens_per_batch": 400, "gradient_accumulation_steps": 2} if kind == "tokens" else {}
    )
    sums = []
    for workers in ({}, SPAWNED):
        # Six batches are an epoch of twelve rows: by then all of them have been seen once, in whatever order.
        steps = 3 if kind == "tokens" else 6
        made = trainer(
            tmp_path,
            rows=rows,
            learning_rate=0.0,
            max_steps=steps,
            logging_steps=steps,
            **options,
            **workers,
        )
        made.train()
        sums.append(logged(made, "rewards/chosen"))
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)


@pytest.mark.parametrize(("layout", "fused"), [("padded", False), ("packed", True)])
def test_a_stock_trainer_reads_raw_rows_in_spawned_workers(layout: str, fused: bool, tmp_path: Path) -> None:
    losses = []
    for workers in ({}, SPAWNED):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **workers,
        )
        made = Trainer(
            tiny.model(),
            arguments,
            train_dataset=Dataset.from_list(ROWS),
            data_collator=collator(layout),
            compute_loss_func=ORPOLoss(),
        )
        (fuse_head(made) if fused else made).train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[1] == losses[0]


def test_workers_share_the_rows_of_an_iterable_out() -> None:
    prepared, _ = prepare_dataset(Stream(), tiny.tokenizer())
    loaded = torch.utils.data.DataLoader(
        prepared, batch_size=None, num_workers=2, multiprocessing_context="spawn", collate_fn=_as_it_is
    )
    assert sorted(map(str, loaded)) == sorted(map(str, prepared))


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


class Plugin:
    """A layout whose class cannot be found by another process, and a row format."""

    @hookimpl
    def orpo_layouts(self) -> list[Layout]:
        class Mine(Padded):
            name = "mine"

        return [Mine()]

    @hookimpl
    def orpo_row_formats(self) -> list[RowFormat]:
        return [RowFormat(name="never", columns="none", matches=lambda row: False, parse=lambda row: None)]


def test_a_plugins_layout_goes_by_its_name() -> None:
    plugin = Plugin()
    get_plugin_manager().register(plugin)
    try:
        made = collator("mine")
        sent = pickle.dumps(made)
        assert_equal(pickle.loads(sent)(ROWS), made(ROWS))
        formats = pickle.dumps(collator("padded"))
    finally:
        get_plugin_manager().unregister(plugin)
    with pytest.raises(errors.ConfigError, match=r"knows the layouts padded, .* has mine: register plugins at the"):
        pickle.loads(sent)
    with pytest.raises(errors.ConfigError, match=r"knows the row formats .* has never, .*: register plugins at the"):
        pickle.loads(formats)


def test_a_plugin_registered_at_the_top_of_a_script_is_there_in_spawned_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from tests.trainers import test_spawned_workers as rows_and_plugin\n"
        "from orpo_plugins.hooks.plugins import get_plugin_manager\n"
        "get_plugin_manager().register(rows_and_plugin.Plugin())\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(rows_and_plugin.ROWS, batch_size=4, num_workers=1,\n"
        "        multiprocessing_context='spawn', collate_fn=rows_and_plugin.collator('mine'))\n"
        "    print(len(list(loader)))\n"
    )
    run = subprocess.run([sys.executable, script, str(ROOT)], capture_output=True, text=True)
    assert run.stdout.strip() == "3", run.stderr


@pytest.mark.parametrize("name", ["max_length", "truncation_mode", "sft_rows", "padding_value"])
def test_an_option_set_on_a_collator_that_is_made_is_refused(name: str) -> None:
    with pytest.raises(errors.ConfigError, match=rf"{name}=8 would have no effect .*: make a new one, ORPOCollator"):
        setattr(collator("padded"), name, 8)


def test_an_unknown_nll_over_set_on_a_collator_is_refused() -> None:
    made = collator("padded")
    with pytest.raises(errors.ConfigError, match="unknown nll_over 'answer'"):
        made.nll_over = "answer"
