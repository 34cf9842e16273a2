"""However eight pairs are cut into micro-batches and ranks, an optimizer step is the same."""

from typing import Any

import pytest
import torch

from tests.kit.compare import assert_all_within, assert_within, relative_difference
from tests.kit.launching import run_worker

PAIRS, STEPS = 8, 5
# Norm weights near 1 round at 6e-8: with this rate and the workers' wide initialization they change by 0.1 and more.
OPTIONS: dict[str, Any] = {"rows": PAIRS * STEPS, "learning_rate": 0.5, "max_steps": STEPS}


def cuts(ranks: int, **options: Any) -> list[dict[str, Any]]:
    """8 x 1, 4 x 2 and 1 x 8 micro-batches x accumulation, shared out over the ranks."""
    return [
        {
            **OPTIONS,
            **options,
            "per_device_train_batch_size": max(1, size // ranks),
            "gradient_accumulation_steps": PAIRS // max(1, size // ranks) // ranks,
        }
        for size in (8, 4, 1)
    ]


def flat(run: dict[str, Any]) -> torch.Tensor:
    return torch.cat([change.flatten() for change in run["change"].values()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process: the three cuts with each normalization."""
    runs = [*cuts(1), *cuts(1, nll_normalization="microbatch"), *cuts(1, nll_normalization="pair")]
    return run_worker("train_ddp.py", runs, tmp_path_factory.mktemp("one") / "results", ranks=1)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    runs = [*cuts(2), *cuts(2, nll_normalization="pair")]
    return run_worker("train_ddp.py", runs, tmp_path_factory.mktemp("two") / "results", ranks=2)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("first", [0, 6], ids=["batch", "pair"])
def test_micro_batches_do_not_change_a_step(first: int, cut: int, whole: list[dict[str, Any]]) -> None:
    assert_all_within(whole[first + cut]["change"], whole[first]["change"], 1e-5)


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 3], ids=["batch", "pair"])
def test_two_data_parallel_ranks_do_not_change_a_step(
    first: int, cut: int, whole: list[dict[str, Any]], on_two_ranks: list[dict[str, Any]]
) -> None:
    assert_all_within(on_two_ranks[first + cut]["change"], whole[2 * first]["change"], 1e-5)


def test_the_mean_per_micro_batch_does_change_a_step(whole: list[dict[str, Any]]) -> None:
    """What TRL does; were this small, the tests above could not fail."""
    assert relative_difference(flat(whole[5]), flat(whole[3])) > 0.05


@pytest.mark.parametrize("key", ["loss", "nll_loss", "rewards/margins", "log_odds_ratio", "answer_tokens/chosen"])
def test_logged_figures_do_not_depend_on_the_cut(
    key: str, whole: list[dict[str, Any]], on_two_ranks: list[dict[str, Any]]
) -> None:
    def logged(run: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([entry[key] for entry in run["logs"] if key in entry])

    assert logged(whole[0]).shape == (STEPS,)
    for run in [*whole[1:3], *on_two_ranks[:3]]:
        assert_within(logged(run), logged(whole[0]), 1e-5, key)
