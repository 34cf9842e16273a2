"""A hand-written loop over orpo_forward, its model cut over two ranks by fully_shard, takes the same steps."""

from typing import Any

import pytest
import torch

from tests.kit.compare import assert_all_within
from tests.kit.launching import run_worker, unsharded

OPTIONS: dict[str, Any] = {"learning_rate": 0.5, "kernel": "chunked"}


MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "shared, checkpointed": {"layout": "shared", "checkpointing": True},
    "tied, shared, checkpointed": {"tied": True, "layout": "shared", "checkpointing": True},
    "frozen head, shared": {"frozen": True, "layout": "shared"},
    "capped logits": {"model": "Gemma2"},
}
CUTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"batch_size": 4}) for name in MODELS],
    ("untied", {"batch_size": 1}),
    ("tied", {"batch_size": 1}),
    ("untied", {"batch_size": 2, "kernel": "reference"}),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    return unsharded({name: {**OPTIONS, **model} for name, model in MODELS.items()}, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    runs = [{**OPTIONS, **MODELS[name], **cut} for name, cut in CUTS]
    return run_worker("train_fsdp2.py", runs, tmp_path_factory.mktemp("two") / "results", ranks=2)


@pytest.mark.parametrize("run", range(len(CUTS)), ids=[f"{name}, {cut}" for name, cut in CUTS])
def test_sharded_steps_equal_those_of_one_process(
    run: int, one_process: dict[str, dict[str, torch.Tensor]], sharded: list[dict[str, torch.Tensor]]
) -> None:
    assert_all_within(sharded[run], one_process[CUTS[run][0]], 1e-5)


def test_the_weights_did_change(one_process: dict[str, dict[str, torch.Tensor]]) -> None:
    assert all(change.norm() > 0.1 for change in one_process["untied"].values())
    assert one_process["untied"]["lm_head.weight"].norm() > 1
