"""Weights and margins of single rows: weight w counts as w rows, and a margin is subtracted inside the sigmoid."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from orpo_plugins import ORPOCollator, ORPOConfig, ORPOLoss, ORPOTrainer, errors, orpo_forward
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.layouts.attention import prepare
from orpo_plugins.targets import Targets, with_weights
from tests.kit import tiny
from tests.kit.compare import assert_all_within, assert_within

ROWS = tiny.rows(3)
TWICE = [ROWS[0], ROWS[1], ROWS[1], ROWS[2]]
WEIGHTED = [ROWS[0], {**ROWS[1], "weight": 2}, {**ROWS[2], "weight": None}]


def batch(rows: list[dict[str, Any]], layout: str = "padded") -> dict[str, Any]:
    return ORPOCollator(tiny.tokenizer(), layout=layout)(rows)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the loss


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("normalization", ["batch", "pair"])
def test_a_row_of_weight_two_counts_as_two_rows(normalization: str, layout: str) -> None:
    model = tiny.model().eval()
    if layout == "shared":
        prepare(model)
    one = orpo_forward(model, batch(WEIGHTED, layout), nll_normalization=normalization)
    two = orpo_forward(model, batch(TWICE, layout), nll_normalization=normalization)
    assert_within(one.loss, two.loss.detach(), 1e-6)
    assert_within(one.nll_loss, two.nll_loss, 1e-6)
    assert_all_within(gradients(model, one.loss), gradients(model, two.loss), 1e-5)


def test_weights_are_relative() -> None:
    model = tiny.model().eval()
    tenth = [{**row, "weight": 0.1} for row in ROWS]
    assert_within(orpo_forward(model, batch(tenth)).loss, orpo_forward(model, batch(ROWS)).loss.detach(), 1e-6)


def test_a_margin_is_subtracted_inside_the_sigmoid() -> None:
    model = tiny.model().eval()
    plain = orpo_forward(model, batch(ROWS), beta=0.3, odds_temperature=2.0)
    rows = [{**ROWS[0], "margin": 1.5}, {**ROWS[1], "margin": -0.5}, ROWS[2]]
    out = orpo_forward(model, batch(rows), beta=0.3, odds_temperature=2.0)
    ratio = F.logsigmoid(2.0 * plain.log_odds_chosen - torch.tensor([1.5, -0.5, 0.0]))
    assert_within(out.log_odds_ratio, ratio, 1e-6)
    assert_within(out.loss, plain.nll_loss - 0.3 * ratio.mean(), 1e-6)


def test_the_loss_for_a_stock_trainer_reads_them_too() -> None:
    model = tiny.model().eval()
    made = batch([{**ROWS[0], "margin": 1.0}, *WEIGHTED[1:]])
    outputs = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
    loss = ORPOLoss(beta=0.1)(outputs, made["labels"])
    assert_within(loss, orpo_forward(model, made).loss.detach(), 1e-6)


# ---- the table


def test_numbers_travel_with_the_labels_unrounded() -> None:
    table = torch.tensor([[0, 5, 0, 3], [1, 6, 2, 1], [2, 7, 1, 3], [3, 8, 3, 1]])
    weights, margins = [0.1, 3e-7], [-2.5, 1e9]
    targets = Targets.from_table(with_weights(table, weights, margins), 2)
    assert targets.pair_weights().tolist() == torch.tensor(weights).tolist()
    margins_read = targets.pair_margins()
    assert margins_read is not None
    assert margins_read.tolist() == torch.tensor(margins).tolist()
    assert torch.equal(targets.token_ids, table[:, 1])


def test_rows_that_all_count_alike_keep_the_plain_table() -> None:
    assert batch([{**row, "weight": 1, "margin": 0.0} for row in ROWS])["labels"].shape[1] == 4


# ---- rows


@pytest.mark.parametrize(
    "source", [list, Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()]
)
def test_the_columns_are_kept_and_reported(source: Any) -> None:
    rows = [{**row, "weight": weight, "margin": 0.25} for row, weight in zip(ROWS, (1.0, 2.0, 0.5), strict=True)]
    dataset, report = prepare_dataset(source(rows), tiny.tokenizer())
    assert [row["weight"] for row in dataset] == [1.0, 2.0, 0.5]
    assert [row["margin"] for row in dataset] == [0.25] * 3
    assert "columns 'weight' and 'margin': 2 rows with a weight, 3 with a margin" in report.summary()
    assert torch.equal(batch(list(dataset))["labels"], batch(rows)["labels"])


def test_a_row_of_weight_zero_is_dropped() -> None:
    dataset, report = prepare_dataset([*ROWS, {**ROWS[0], "weight": 0}], tiny.tokenizer())
    assert len(dataset) == 3
    assert report.dropped == {"the weight is 0": [3]}


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("weight", -1, "a finite number >= 0"),
        ("weight", "high", "a finite number >= 0"),
        ("margin", float("nan"), "a finite number"),
        ("margin", True, "a finite number"),
    ],
)
def test_a_value_that_is_no_number_is_named(column: str, value: Any, wanted: str) -> None:
    with pytest.raises(
        errors.RowError, match=rf"row 1: column '{column}' is .*, expected {wanted}: it changes how much"
    ):
        prepare_dataset([ROWS[0], {**ROWS[1], column: value}], tiny.tokenizer())


# ---- the trainer


def test_training_on_weights_is_training_on_repeated_rows(tmp_path: Path) -> None:
    results = []
    for rows in (WEIGHTED, TWICE):
        args = ORPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, logging_steps=1,
            gradient_accumulation_steps=len(rows), use_cpu=True, report_to="none", bf16=False, disable_tqdm=True,
            learning_rate=0.1, optim="sgd",
        )  # fmt: skip
        trainer = ORPOTrainer(
            tiny.model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tiny.tokenizer()
        )
        trainer.train()
        results.append((dict(trainer.model.state_dict()), trainer.state.log_history, trainer.evaluate()))
    (weights, logs, evaluation), (expected_weights, expected_logs, expected_evaluation) = results
    assert_all_within(weights, expected_weights, 1e-6)
    for key in ("loss", "nll_loss", "rewards/margins", "logps/chosen"):
        assert_within(logs[1][key], expected_logs[1][key], 1e-5, key)
        assert_within(evaluation[f"eval_{key}"], expected_evaluation[f"eval_{key}"], 1e-5, key)
