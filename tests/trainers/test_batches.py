"""`max_tokens_per_batch`, `step_strategy` and grouping by length in runs of `ORPOTrainer`."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from orpo_plugins import ORPOCollator, ORPOLoss, ORPOTrainer, fuse_head
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.errors import ConfigError
from orpo_plugins.integrations.hf_loader import loader, sizes
from orpo_plugins.layouts.batches import PairBatches
from orpo_plugins.options import PairOptions
from tests.kit import tiny
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.encoder_decoder import build
from tests.kit.encoder_decoder import tokenizer as encoder_decoder_tokenizer
from tests.kit.launching import run_worker
from tests.kit.training import config, logged, trainer

ROWS = tiny.skewed_rows(48)
LIMIT = 1200
ARGUMENTS: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def computed(batch: dict[str, Any]) -> int:
    """Tokens that the model computes for a batch."""
    decoder = batch.get("decoder_labels")
    return int(batch["input_ids"].numel() + (0 if decoder is None else decoder.numel()))


class Watched(ORPOCollator):
    """Notes the batches it makes: the rows' tokens, and how many the model computes."""

    rows: list[list[str]]
    tokens: list[int]

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        self.rows.append([str(row["chosen_input_ids"] + row["rejected_input_ids"]) for row in rows])
        self.tokens.append(computed(batch))
        return batch


def run(folder: Path, **options: Any) -> tuple[ORPOTrainer, Watched]:
    """A run over skewed rows, and what it saw."""
    defaults: dict[str, Any] = {"rows": Dataset.from_list(ROWS), "max_length": 512, "max_grad_norm": 0.0}
    made = trainer(folder, **{**defaults, **options})
    seen = made.data_collator
    seen.__class__ = Watched
    seen.rows, seen.tokens = [], []
    made.train()
    return made, seen


def weights(made: ORPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def in_steps(batches: list[list[str]], accumulation: int) -> list[list[str]]:
    """The rows of each optimizer step of one epoch."""
    return [sorted(chain(*batches[at : at + accumulation])) for at in range(0, len(batches), accumulation)]


@pytest.mark.parametrize(
    ("layout", "normalization"),
    [("padded", "batch"), ("packed", "batch"), ("shared", "batch"), ("shared", "pair")],
)
def test_steps_and_weights_are_those_of_plain_batches_and_no_batch_is_over_the_limit(
    layout: str, normalization: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "layout": layout,
        "nll_normalization": normalization,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 0.5,
    }
    plain, plainly = run(tmp_path, model=tiny.model(initializer_range=0.2), **options)
    limit = {"padded": 430, "packed": 310, "shared": 240}[layout]
    cut, evenly = run(tmp_path, model=tiny.model(initializer_range=0.2), max_tokens_per_batch=limit, **options)
    assert max(evenly.tokens) <= limit < max(plainly.tokens)
    assert in_steps(evenly.rows, 8)[:3] == in_steps(plainly.rows, 8)[:3]
    assert {len(rows) for rows in evenly.rows} != {2}
    assert_all_within(weights(cut), weights(plain), 1e-5)
    for key in ("loss", "nll_loss", "log_odds_ratio", "rewards/margins", "answer_tokens/chosen"):
        assert_within(torch.tensor(logged(cut, key)), torch.tensor(logged(plain, key)), 1e-5, key)


@pytest.mark.parametrize("strategy", ["pairs", "tokens"])
@pytest.mark.parametrize("sampling", ["random", "group_by_length", "sequential"])
def test_every_row_is_seen_once_per_epoch_and_epochs_differ(strategy: str, sampling: str, tmp_path: Path) -> None:
    made, seen = run(
        tmp_path,
        max_steps=-1,
        num_train_epochs=2,
        gradient_accumulation_steps=3,
        max_tokens_per_batch=LIMIT,
        step_strategy=strategy,
        train_sampling_strategy=sampling,
    )
    half = len(seen.rows) // 2
    first, second = list(chain(*seen.rows[:half])), list(chain(*seen.rows[half:]))
    assert len(set(first)) == len(ROWS)
    assert sorted(first) == sorted(second)
    assert (first == second) == (sampling == "sequential")
    assert max(seen.tokens) <= LIMIT
    assert made.state.global_step == made.state.max_steps == 2 * -(-half // 3)
    assert made.state.epoch == 2


def test_pairs_that_fill_no_batch_are_dropped_where_asked(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rows": Dataset.from_list(ROWS[:13]),
        "max_steps": -1,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 4,
        "dataloader_drop_last": True,
    }
    plain, plainly = run(tmp_path, **options)
    cut, evenly = run(tmp_path, max_tokens_per_batch=LIMIT, **options)
    assert cut.state.global_step == plain.state.global_step == 2
    assert sorted(chain(*evenly.rows)) == sorted(chain(*plainly.rows))
    assert len(evenly.rows) == len(plainly.rows) == 6


def test_by_tokens_a_step_has_as_many_pairs_as_fit(tmp_path: Path) -> None:
    _, seen = run(tmp_path, max_steps=3, max_tokens_per_batch=LIMIT, step_strategy="tokens", layout="shared")
    assert min(len(rows) for rows in seen.rows) > 4
    assert len(seen.tokens) == 3
    assert min(seen.tokens[:2]) > 0.95 * LIMIT


def test_grouping_by_length_saves_padding(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": "padded", "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
    _, plain = run(tmp_path, **options)
    _, grouped = run(tmp_path, train_sampling_strategy="group_by_length", **options)
    assert {len(rows) for rows in grouped.rows} == {2}
    assert sorted(chain(*grouped.rows)) == sorted(chain(*plain.rows))
    assert sum(grouped.tokens) < 0.75 * sum(plain.tokens)


def test_predictions_stand_in_the_rows_order_where_training_groups_by_length(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS[:10])
    targets = []
    for sampling in ("random", "group_by_length"):
        made = trainer(tmp_path, train_sampling_strategy=sampling, eval_dataset=rows, max_length=512)
        targets.append(torch.as_tensor(made.predict(made.eval_dataset).predictions))
    assert_within(targets[1], targets[0], 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_batch": LIMIT},
        {"max_tokens_per_batch": LIMIT, "step_strategy": "tokens"},
        {"max_tokens_per_batch": LIMIT, "train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["pairs", "tokens", "both", "grouped"],
)
@pytest.mark.parametrize("at", [2, 8], ids=["first epoch", "a later epoch"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(at: int, options: dict[str, Any], tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "rows": Dataset.from_list(tiny.skewed_rows(24)),
        "max_steps": 10,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "max_length": 512,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": at,
        "gradient_accumulation_steps": 2,
        **options,
    }
    whole = trainer(tmp_path / "whole", **shared)
    whole.train()
    resumed = trainer(tmp_path / "resumed", model=tiny.model(seed=1), **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert resumed.state.global_step == whole.state.global_step == 10
    assert_all_within(weights(resumed), weights(whole), 1e-6)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared", "seq2seq"])
@pytest.mark.parametrize("rows", [tiny.skewed_rows(10), tiny.conversations(10)], ids=["texts", "conversations"])
def test_a_rows_cost_is_what_its_batch_computes(layout: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    own = {"model": build("t5"), "tokenizer": encoder_decoder_tokenizer()} if layout == "seq2seq" else {}
    made = trainer(tmp_path, rows=Dataset.from_list(rows), layout=layout, max_length=512, **own)
    lengths, padded = sizes(made.train_dataset, made.data_collator)
    costs = PairBatches(lengths, pairs_per_batch=2, padded=padded)
    for taken in (*([row] for row in range(len(rows))), [1, 4], [0, 2, 7, 9]):
        assert costs.cost(taken) == computed(made.data_collator([made.train_dataset[row] for row in taken]))
    # The same without Arrow tables.
    assert sizes(list(made.train_dataset), made.data_collator) == (lengths, padded)


def test_rows_without_a_rejected_answer_and_padding_to_a_multiple_are_counted(tmp_path: Path) -> None:
    rows = [*tiny.rows(5), *({"prompt": "order ", "chosen": "gladly", "rejected": None} for _ in range(2))]
    for layout in ("padded", "shared"):
        made = trainer(tmp_path, rows=Dataset.from_list(rows), layout=layout, sft_rows=True)
        if layout == "padded":
            made.data_collator.pad_to_multiple_of = 16
        lengths, padded = sizes(made.train_dataset, made.data_collator)
        costs = PairBatches(lengths, pairs_per_batch=2, padded=padded)
        for taken in ([0, 1], [0, 5], [5, 6]):
            assert costs.cost(taken) == computed(made.data_collator([made.train_dataset[row] for row in taken]))


def test_a_selection_of_rows_is_counted_by_its_own_rows(tmp_path: Path) -> None:
    made = trainer(tmp_path, rows=Dataset.from_list(ROWS), layout="shared", max_length=512)
    all_of_them, _ = sizes(made.train_dataset, made.data_collator)
    picked, _ = sizes(made.train_dataset.select([7, 3, 40]), made.data_collator)
    assert picked == [all_of_them[row] for row in (7, 3, 40)]


def test_after_a_fall_back_to_padded_batches_are_counted_as_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orpo_plugins.integrations import hf_run_start as before_training

    check = before_training.check_layout
    monkeypatch.setattr(
        before_training, "check_layout", lambda *args, **kwargs: replace(check(*args, **kwargs), row_difference=1.0)
    )
    _, seen = run(tmp_path, max_tokens_per_batch=LIMIT, step_strategy="tokens")
    assert seen.layout.name == "padded"
    assert max(seen.tokens) <= LIMIT
    assert sum(seen.tokens) > 0.6 * LIMIT * len(seen.tokens)


def test_means_per_micro_batch_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, max_tokens_per_batch=LIMIT, nll_normalization="microbatch", gradient_accumulation_steps=2)
    assert "averages over batches, and max_tokens_per_batch=1200 gives these different numbers" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens_per_batch": -5}, "max_tokens_per_batch is -5"),
        ({"step_strategy": "tokens"}, "max_tokens_per_batch, which is None: set it"),
        ({"max_tokens_per_batch": 50, "step_strategy": "rows"}, "unknown step_strategy 'rows'; known: pairs, tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size looks for the pairs that fit"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True cuts each batch apart"),
        (
            {"rows": Dataset.from_list(ROWS).to_iterable_dataset()},
            "max_tokens_per_batch=1200 needs the length of every row .* is a stream: load it whole",
        ),
    ],
)
def test_what_batches_by_tokens_cannot_go_with_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, max_tokens_per_batch=LIMIT, **options)


def test_a_stream_cannot_be_grouped_by_length(tmp_path: Path) -> None:
    message = "train_sampling_strategy='group_by_length' needs the length of every row .* is a stream: load it whole"
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, rows=stream, train_sampling_strategy="group_by_length")
    # A stock Trainer's rows are looked at where its batches are made.
    stock = Trainer(
        model=tiny.model(),
        args=TrainingArguments(
            **ARGUMENTS,
            output_dir=str(tmp_path),
            max_steps=1,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
        ),
        train_dataset=stream,
        data_collator=ORPOCollator(tiny.tokenizer(), max_length=512),
        compute_loss_func=ORPOLoss(),
    )
    with pytest.raises(ConfigError, match=message):
        fuse_head(stock).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_tokens_per_batch": 20},
            r"row \d+ of the prepared dataset takes \d+ tokens by itself, more than max_tokens_per_batch=20",
        ),
        (
            {"max_tokens_per_batch": 400, "per_device_train_batch_size": 8},
            "Raise gradient_accumulation_steps and lower the batch size by the same factor, raise "
            "max_tokens_per_batch, or set step_strategy='tokens'",
        ),
        (
            {"max_tokens_per_batch": 10**6, "per_device_train_batch_size": 64, "dataloader_drop_last": True},
            "dataloader_drop_last leaves no batch: the 48 pairs are fewer than one batch of 64 on each of 1 ranks",
        ),
    ],
)
def test_a_limit_that_cannot_be_kept_is_named_before_the_first_step(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path, rows=Dataset.from_list(ROWS), max_length=512, **options)
    with pytest.raises(ConfigError, match=message):
        made.train()
    assert made.state.global_step == 0


DDP: dict[str, Any] = {"rows": 40, "learning_rate": 0.5, "max_steps": 5, "gradient_accumulation_steps": 4}

TWICE = {**DDP, "rows": 32, "max_steps": 8, "per_device_train_batch_size": 1, "max_tokens_per_batch": 800}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    runs = [
        {**DDP, "per_device_train_batch_size": 1},
        {**DDP, "per_device_train_batch_size": 1, "max_tokens_per_batch": 800},
        # 41 rows in two epochs: the last step has one row for two ranks.
        {**DDP, "rows": 41, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 1}
        | {"max_tokens_per_batch": 800},
        {**DDP, "rows": 41, "max_steps": -1, "num_train_epochs": 2, "max_tokens_per_batch": 1500}
        | {"step_strategy": "tokens", "train_sampling_strategy": "group_by_length"},
        # Two epochs of four steps, and from the third step of the second again.
        {**TWICE, "save_strategy": "steps", "save_steps": 6},
        {**TWICE, "resume": 6},
    ]
    return run_worker("train_ddp.py", runs, tmp_path_factory.mktemp("two") / "results", ranks=2)


def test_on_two_ranks_a_step_is_that_of_plain_batches_on_one(
    on_two_ranks: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = {**DDP, "per_device_train_batch_size": 2}
    one = run_worker("train_ddp.py", [options], tmp_path_factory.mktemp("one") / "results", ranks=1)[0]
    assert_all_within(on_two_ranks[0]["change"], one["change"], 1e-5)
    assert_all_within(on_two_ranks[1]["change"], one["change"], 1e-5)


@pytest.mark.parametrize("which", [2, 3], ids=["pairs", "tokens"])
def test_two_ranks_end_their_epochs_together(which: int, on_two_ranks: list[dict[str, Any]]) -> None:
    logs = on_two_ranks[which]["logs"]
    assert logs[-1]["epoch"] == 2
    steps = [entry["step"] for entry in logs if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))
    assert which == 3 or len(steps) == 12


def test_on_two_ranks_a_resumed_run_ends_where_an_uninterrupted_one_does(on_two_ranks: list[dict[str, Any]]) -> None:
    whole, resumed = on_two_ranks[4:]
    # The checkpoint's log goes on.
    assert [entry["step"] for entry in resumed["logs"] if "loss" in entry] == list(range(1, 9))
    assert_all_within(resumed["change"], whole["change"], 1e-6)


def test_a_stock_trainer_takes_the_same_batches(tmp_path: Path) -> None:
    class TokenBatchesTrainer(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            lengths, padded = sizes(self.train_dataset, self.data_collator)
            made = PairBatches(
                lengths,
                padded=padded,
                pairs_per_batch=2,
                gradient_accumulation_steps=4,
                max_tokens_per_batch=LIMIT,
                ranks=self.args.world_size,
                rank=self.args.process_index,
                seed=self.args.seed,
            )
            return loader(self, made)

    options: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 4, "learning_rate": 0.5, "seed": 7}
    ours, _ = run(
        tmp_path, model=tiny.model(initializer_range=0.2), max_tokens_per_batch=LIMIT, layout="padded", **options
    )
    stock = TokenBatchesTrainer(
        model=tiny.model(initializer_range=0.2),
        args=TrainingArguments(**ARGUMENTS, **options, output_dir=str(tmp_path), remove_unused_columns=False),
        train_dataset=prepare_dataset(ROWS, tiny.tokenizer(), PairOptions(max_length=512))[0],
        data_collator=ORPOCollator(tiny.tokenizer(), max_length=512),
        compute_loss_func=ORPOLoss(),
    )
    fuse_head(stock).train()
    assert_all_within(dict(stock.model.named_parameters()), weights(ours), 1e-6)


def test_the_options_are_flags_of_the_command_line() -> None:
    pytest.importorskip("trl")
    from orpo_plugins.integrations.trl_script import make_parser

    flags = ["--dataset_name", "rows", "--max_tokens_per_batch", "4096", "--step_strategy", "tokens"]
    parsed = make_parser().parse_args_and_config(args=[*flags, "--use_cpu", "True"])
    arguments = next(part for part in parsed if hasattr(part, "max_tokens_per_batch"))
    assert (arguments.max_tokens_per_batch, arguments.step_strategy) == (4096, "tokens")
