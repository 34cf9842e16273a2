"""Rows without a rejected answer: the NLL alone, with every denominator right, in every layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_plugins import ORPOCollator, ORPOConfig, ORPOTrainer, errors, linear_orpo_loss, orpo_forward
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.types import Metric
from orpo_plugins.layouts.attention import prepare
from orpo_plugins.objective import LossTerm
from orpo_plugins.options import PairOptions
from tests.kit import tiny
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.encoder_decoder import tokenizer as seq2seq_tokenizer

ROWS = tiny.rows(6)
MIXED = [{**row, "rejected": None} if index in (1, 4, 5) else row for index, row in enumerate(ROWS)]
PAIRS = [row for row in MIXED if row["rejected"]]
LAYOUTS = ("padded", "packed", "shared", "seq2seq")


def model_for(layout: str) -> Any:
    model = encoder_decoder("t5") if layout == "seq2seq" else tiny.model()
    if layout in ("packed", "shared"):
        prepare(model)
    return model.eval()


def batch(rows: list[dict[str, Any]], layout: str = "padded", **options: Any) -> dict[str, Any]:
    tokenizer = seq2seq_tokenizer() if layout == "seq2seq" else tiny.tokenizer()
    return ORPOCollator(tokenizer, layout=layout, sft_rows=True, **options)(rows)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the loss


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pair_term_is_that_of_the_pairs_and_the_nll_that_of_all_rows(layout: str, kernel: str) -> None:
    model = model_for(layout)
    out = orpo_forward(model, batch(MIXED, layout), kernel=kernel)
    nll_of_all = orpo_forward(model, batch(ROWS, layout), beta=0.0, kernel=kernel)
    pairs = orpo_forward(model, batch(PAIRS, layout), kernel=kernel)
    ratio_of_pairs = pairs.loss - pairs.nll_loss
    assert_within(out.loss, (nll_of_all.loss + ratio_of_pairs).detach(), 1e-6)
    expected = gradients(model, nll_of_all.loss)
    alone = gradients(model, orpo_forward(model, batch(PAIRS, layout), beta=0.0, kernel=kernel).loss)
    for name, gradient in gradients(model, pairs.loss).items():
        expected[name] += gradient - alone[name]
    assert_all_within(gradients(model, out.loss), expected, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_any_pair_is_the_nll_alone(layout: str) -> None:
    model = model_for(layout)
    rows = [{**row, "rejected": None} for row in ROWS[:3]]
    out = orpo_forward(model, batch(rows, layout))
    expected = orpo_forward(model, batch(ROWS[:3], layout), beta=0.0)
    assert_within(out.loss, expected.loss.detach(), 1e-6)
    assert_all_within(gradients(model, out.loss), gradients(model, expected.loss), 1e-5)


@pytest.mark.parametrize("normalization", ["batch", "pair"])
def test_cut_into_micro_batches_the_gradient_is_the_same(normalization: str) -> None:
    model = tiny.model().eval()
    whole = gradients(model, orpo_forward(model, batch(MIXED), nll_normalization=normalization).loss)
    parts = [batch(MIXED[i : i + 2]) for i in (0, 2, 4)]
    tokens = sum(float(orpo_forward(model, part).metrics["nll_tokens"]) for part in parts)
    model.zero_grad()
    for part in parts:
        orpo_forward(
            model, part, nll_normalization=normalization, nll_tokens=tokens, num_pairs=3.0, num_examples=6.0
        ).loss.backward()
    summed = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_all_within(summed, whole, 1e-5)


def test_a_term_that_divides_by_the_length_of_the_rejected_answer_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    term = LossTerm(name="per token", compute=lambda pairs: pairs.rejected / pairs.rejected_lengths)
    monkeypatch.setattr(plugins, "loss_term", lambda name: term)
    model = tiny.model()
    out = orpo_forward(model, batch(MIXED), loss_terms={"per token": 0.5})
    assert all(gradient.isfinite().all() for gradient in gradients(model, out.loss).values())


def test_the_output_says_which_rows_have_no_pair() -> None:
    out = orpo_forward(tiny.model(), batch(MIXED))
    alone = [row["rejected"] is None for row in MIXED]
    for figure in (out.rejected_logps, out.log_odds_chosen, out.log_odds_ratio):
        assert figure.isnan().tolist() == alone
    assert out.chosen_logps.isfinite().all()


def test_the_kernel_still_refuses_an_answer_without_a_label() -> None:
    labels = torch.tensor([[5, 6], [-100, -100]])
    with pytest.raises(errors.BatchError, match=r"row 1 \(rejected answer of pair 0\) has no label"):
        linear_orpo_loss(torch.randn(2, 2, 4), torch.randn(8, 4), labels)


# ---- rows


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "order", "chosen": " gladly", "rejected": None},
        {"prompt": "order", "chosen": " gladly"},
        {"prompt": [{"role": "user", "content": "order"}], "chosen": [{"role": "assistant", "content": "gladly"}]},
        {"chosen": [{"role": "user", "content": "order"}, {"role": "assistant", "content": "gladly"}]},
        {"instruction": "order", "chosen": "gladly", "rejected": None},
        {"conversations": [{"from": "human", "value": "order"}], "chosen": {"from": "gpt", "value": "gladly"}},
        {"system": "please", "prompt": "order", "chosen": "gladly"},
    ],
)
def test_every_format_may_leave_the_rejected_answer_out(row: dict[str, Any]) -> None:
    dataset, report = prepare_dataset([row], tiny.tokenizer(), PairOptions(sft_rows=True))
    assert (report.kept, report.sft_only) == (1, 1)
    assert dataset[0]["rejected_input_ids"] == dataset[0]["rejected_labels"] == []
    paired, _ = prepare_dataset([{**row, "rejected": rejected_like(row["chosen"])}], tiny.tokenizer())
    assert dataset[0]["chosen_input_ids"] == paired[0]["chosen_input_ids"]
    assert dataset[0]["chosen_labels"] == paired[0]["chosen_labels"]


def rejected_like(chosen: Any) -> Any:
    """Another answer in the form of `chosen`."""
    if isinstance(chosen, str):
        return chosen.replace("gladly", "never")
    if isinstance(chosen, dict):
        return {**chosen, "value": "never"}
    return [*chosen[:-1], {**chosen[-1], "content": "never"}]


def test_unasked_for_it_stays_an_error_that_names_the_option() -> None:
    with pytest.raises(errors.RowError, match=r"row 1 .*'rejected' is None.*train such rows with the NLL alone"):
        prepare_dataset(MIXED, tiny.tokenizer())


def test_without_a_prompt_the_answers_beginning_is_unknown() -> None:
    with pytest.raises(errors.RowError, match="no rejected answer, so the beginning of the answer is not known"):
        prepare_dataset([{"chosen": "order gladly"}], tiny.tokenizer(), PairOptions(sft_rows=True))


def test_tokenized_rows_pass_through_and_the_report_counts_them() -> None:
    dataset, report = prepare_dataset(MIXED, tiny.tokenizer(), PairOptions(sft_rows=True))
    assert "no rejected answer, trained with the NLL alone: 3 rows" in report.summary()
    again = batch(list(dataset))
    made = batch(MIXED)
    assert all(torch.equal(again[key], made[key]) for key in made)


# ---- the trainer


def test_training_counts_only_pairs_in_the_figures_of_pairs(tmp_path: Path) -> None:
    metric = Metric(name="gap", compute=lambda out: out.chosen_logps - out.rejected_logps)
    plugin = type("Plugin", (), {"orpo_metrics": staticmethod(plugins_hook(lambda: [metric]))})
    manager = plugins.get_plugin_manager()
    manager.register(plugin)
    try:
        args = ORPOConfig(
            output_dir=str(tmp_path), sft_rows=True, max_steps=2, per_device_train_batch_size=2, logging_steps=1,
            gradient_accumulation_steps=3, use_cpu=True, report_to="none", bf16=False, disable_tqdm=True,
            learning_rate=0.0,
        )  # fmt: skip
        trainer = ORPOTrainer(
            tiny.model().eval(), args, train_dataset=MIXED, eval_dataset=MIXED, processing_class=tiny.tokenizer()
        )
        trainer.train()
        evaluation = trainer.evaluate()
        logps = trainer.predict(trainer.eval_dataset).predictions
    finally:
        manager.unregister(plugin)
    with torch.no_grad():
        pairs, rows = orpo_forward(tiny.model().eval(), batch(PAIRS)), orpo_forward(tiny.model().eval(), batch(MIXED))
    for log in (trainer.state.log_history[0], {key.removeprefix("eval_"): v for key, v in evaluation.items()}):
        assert_within(log["logps/chosen"], pairs.chosen_logps.mean(), 1e-5)
        assert_within(log["logps/rejected"], pairs.rejected_logps.mean(), 1e-5)
        assert_within(log["gap"], (pairs.chosen_logps - pairs.rejected_logps).mean(), 1e-4)
        assert_within(log["nll_loss"], rows.nll_loss, 1e-5)
        assert_within(log["loss"], rows.loss, 1e-5)
    assert [math.isnan(rejected) for _, rejected in logps] == [row["rejected"] is None for row in MIXED]


def plugins_hook(function: Any) -> Any:
    """`orpo_metrics` as a hook implementation."""
    from orpo_plugins import hookimpl

    function.__name__ = "orpo_metrics"
    return hookimpl(function)
