"""A hand-written loop over orpo_forward, its model cut over two ranks by fully_shard, takes the same steps."""

from typing import Any

import pytest
import torch
from helpers import assert_all_within
from launching import run_worker

OPTIONS: dict[str, Any] = {"learning_rate": 0.5, "kernel": "chunked"}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    runs = {"untied": {**OPTIONS, "batch_size": 8}, "tied": {**OPTIONS, "batch_size": 8, "tied": True}}
    results = run_worker("train_fsdp2.py", [*runs.values()], tmp_path_factory.mktemp("one") / "results", ranks=1)
    return dict(zip(runs, results, strict=True))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    runs = {
        "untied, 4 x 2": {**OPTIONS, "batch_size": 4},
        "untied, 1 x 8": {**OPTIONS, "batch_size": 1},
        "untied, reference": {**OPTIONS, "batch_size": 2, "kernel": "reference"},
        "tied, 4 x 2": {**OPTIONS, "batch_size": 4, "tied": True},
        "tied, 1 x 8": {**OPTIONS, "batch_size": 1, "tied": True},
    }
    results = run_worker("train_fsdp2.py", [*runs.values()], tmp_path_factory.mktemp("two") / "results", ranks=2)
    return dict(zip(runs, results, strict=True))


@pytest.mark.parametrize("name", ["untied, 4 x 2", "untied, 1 x 8", "untied, reference", "tied, 4 x 2", "tied, 1 x 8"])
def test_sharded_steps_equal_those_of_one_process(
    name: str, one_process: dict[str, dict[str, torch.Tensor]], sharded: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert_all_within(sharded[name], one_process[name.split(",")[0]], 1e-5)


def test_the_weights_did_change(one_process: dict[str, dict[str, torch.Tensor]]) -> None:
    assert all(change.norm() > 0.1 for change in one_process["untied"].values())
    assert one_process["untied"]["lm_head.weight"].norm() > 1
