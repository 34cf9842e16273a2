"""The same training by TRL's ORPOTrainer and by ours."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from orpo_plugins import ORPOConfig, ORPOTrainer
from tests.kit import tiny
from tests.kit.compare import assert_all_within

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL announces that experimental trainers may change
    orpo = pytest.importorskip("trl.experimental.orpo")


STEPS = 3


class Record(TrainerCallback):
    """Keeps what each optimizer step saw."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def run(
    trainer_class: Any,
    config_class: Any,
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    folder: Path,
    make_tokenizer: Callable[[], Any] = tiny.tokenizer,
    **options: Any,
) -> tuple[Record, list[dict[str, float]], dict[str, float]]:
    """(gradients per step, training logs, evaluation metrics) of three SGD steps."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_length": 512,
        "max_steps": STEPS,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    record = Record()
    with warnings.catch_warnings():
        if trainer_class is not ORPOTrainer:
            warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            args=config_class(**arguments),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=make_tokenizer(),
            callbacks=[record],
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        trainer.evaluate()
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    return record, logs, evaluation


TIMES = ("runtime", "per_second", "epoch", "step")


def assert_same_figures(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Every key of theirs that is no time is in ours, within 1e-5."""
    keys = [key for key in theirs if not key.endswith(TIMES)]
    assert len(keys) >= 12
    assert set(keys) <= set(ours)
    for key in keys:
        # Differences of nearly equal numbers are judged against the size of what is subtracted.
        slack = 1e-6 if key.endswith(("margins", "log_odds_chosen", "logits/chosen", "logits/rejected")) else 0.0
        assert abs(ours[key] - theirs[key]) <= 1e-5 * abs(theirs[key]) + slack, (key, ours[key], theirs[key])


def compare(
    make_model: Callable[[], PreTrainedModel],
    rows: list[dict[str, Any]],
    folder: Path,
    layout: str = "padded",
    **options: Any,
) -> None:
    theirs, their_logs, their_evaluation = run(
        orpo.ORPOTrainer, orpo.ORPOConfig, make_model(), rows, folder / "theirs", **options
    )
    ours, our_logs, our_evaluation = run(
        ORPOTrainer,
        ORPOConfig,
        make_model(),
        rows,
        folder / "ours",
        layout=layout,
        nll_normalization="microbatch",
        **options,
    )
    assert len(ours.gradients) == len(theirs.gradients) == STEPS
    for our_step, their_step in zip(ours.gradients, theirs.gradients, strict=True):
        assert_all_within(our_step, their_step, 1e-5)
    for our_log, their_log in zip(our_logs, their_logs, strict=True):
        assert_same_figures(our_log, their_log)
    assert_same_figures(our_evaluation, their_evaluation)
