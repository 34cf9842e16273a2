"""With the model cut over two ranks by DeepSpeed's ZeRO, a step is that of one process."""

import importlib.util
from typing import Any

import pytest
import torch

from tests.kit.compare import assert_all_within, assert_within
from tests.kit.launching import run_worker, unsharded

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not among the dependencies: pip install deepspeed", allow_module_level=True)
pytest.importorskip("peft")

OPTIONS: dict[str, Any] = {"learning_rate": 0.5, "kernel": "chunked"}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "tied, shared, checkpointed": {"tied": True, "layout": "shared", "checkpointing": True},
    "frozen head, shared": {"frozen": True, "layout": "shared"},
    "head in modules_to_save": {"adapter": True},
    "capped logits": {"model": "Gemma2"},
}
CUTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"stage": 3, "batch_size": 4}) for name in MODELS],
    ("untied", {"stage": 3, "batch_size": 1}),
    ("untied", {"stage": 3, "batch_size": 2, "kernel": "reference"}),
    ("untied", {"stage": 2, "batch_size": 1}),
    ("tied, shared, checkpointed", {"stage": 2, "batch_size": 4}),
    ("frozen head, shared", {"stage": 2, "batch_size": 4}),
]
TRAINER: dict[str, Any] = {**OPTIONS, "max_steps": 5, "eval_rows": 10}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    return unsharded({name: {**OPTIONS, **model} for name, model in MODELS.items()}, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def trainer_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = {**TRAINER, "rows": 40, "per_device_train_batch_size": 8}
    return run_worker("train_ddp.py", [run], tmp_path_factory.mktemp("trainer") / "results", ranks=1)[0]


@pytest.fixture(scope="module")
def cut_by_zero(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Every cut, and the trainer with stage 3, gradient checkpointing and the layout that it chooses itself."""
    runs = [{**OPTIONS, **MODELS[name], **cut} for name, cut in CUTS]
    trainer = {**TRAINER, "stage": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return run_worker("train_deepspeed.py", [*runs, trainer], tmp_path_factory.mktemp("two") / "results", ranks=2)


@pytest.mark.parametrize("run", range(len(CUTS)), ids=[f"{name}, {cut}" for name, cut in CUTS])
def test_steps_under_zero_equal_those_of_one_process(
    run: int, one_process: dict[str, dict[str, torch.Tensor]], cut_by_zero: list[Any]
) -> None:
    assert_all_within(cut_by_zero[run], one_process[CUTS[run][0]], 1e-5)


def test_the_weights_did_change(one_process: dict[str, dict[str, torch.Tensor]]) -> None:
    assert all(change.norm() > 0.05 for change in one_process["tied"].values())
    assert one_process["head in modules_to_save"]["base_model.model.lm_head.modules_to_save.default.weight"].norm() > 1


def test_the_trainer_takes_the_same_steps_and_saves_whole_weights(
    cut_by_zero: list[Any], trainer_of_one_process: dict[str, Any]
) -> None:
    assert_all_within(cut_by_zero[-1]["change"], trainer_of_one_process["change"], 1e-5)


@pytest.mark.parametrize("key", ["loss", "grad_norm", "nll_loss", "rewards/margins", "log_odds_ratio"])
def test_the_trainer_logs_the_same_figures(
    key: str, cut_by_zero: list[Any], trainer_of_one_process: dict[str, Any]
) -> None:
    found, expected = (
        torch.tensor([entry[key] for entry in run["logs"] if key in entry])
        for run in (cut_by_zero[-1], trainer_of_one_process)
    )
    assert expected.shape == (5,)
    assert_within(found, expected, 1e-5, key)


@pytest.mark.parametrize("key", ["eval_loss", "eval_rewards/margins"])
def test_the_trainer_evaluates_to_the_same_figures(
    key: str, cut_by_zero: list[Any], trainer_of_one_process: dict[str, Any]
) -> None:
    # The margin is a small difference of log-probabilities of weights that agree within 1e-5 of their change.
    assert_within(cut_by_zero[-1]["eval"][key], trainer_of_one_process["eval"][key], 1e-4, key)
