"""Evaluation and streams on two ranks: no pair counts twice, none is cut apart."""

from typing import Any

import pytest

from tests.kit.launching import run_worker

OPTIONS: dict[str, Any] = {"rows": 8, "eval_rows": 9, "max_steps": 1, "learning_rate": 1e-6}
FIGURES = ("loss", "nll_loss", "rewards/accuracies", "rewards/chosen", "log_odds_ratio", "answer_tokens/chosen")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """On one and two ranks: batches of 4 and 2 with each normalization, then a stream."""
    folder = tmp_path_factory.mktemp("runs")
    ways = [
        {**OPTIONS, "per_device_eval_batch_size": 4},
        {**OPTIONS, "per_device_eval_batch_size": 2, "nll_normalization": "pair"},
        {**OPTIONS, "streaming": True, "per_device_train_batch_size": 2, "max_steps": 2},
    ]
    return {ranks: run_worker("train_ddp.py", ways, folder / f"{ranks}", ranks=ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("way", [0, 1], ids=["batch", "pair"])
@pytest.mark.parametrize("figure", FIGURES)
def test_nine_rows_on_two_ranks_are_nine_rows(figure: str, way: int, runs: dict[int, list[Any]]) -> None:
    one, two = (runs[ranks][way]["eval"][f"eval_{figure}"] for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)


def test_a_stream_is_shared_out_by_rows(runs: dict[int, list[Any]]) -> None:
    losses = [entry["loss"] for entry in runs[2][2]["logs"] if "loss" in entry]
    assert len(losses) == 2
    assert all(4 < loss < 7 for loss in losses)
