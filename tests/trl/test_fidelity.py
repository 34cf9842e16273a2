"""With layout=padded and nll_normalization=microbatch, every number of TRL's ORPOTrainer is reproduced."""

from pathlib import Path

import pytest

from orpo_plugins import ORPOConfig, ORPOTrainer
from tests.kit import tiny
from tests.kit.beside_trl import compare, orpo, run
from tests.kit.compare import assert_all_within

ROWS = {"strings": tiny.rows, "conversations": tiny.conversations}
MODELS = {"llama": tiny.model, "experts": tiny.mixture_of_experts, "tied": lambda: tiny.model(tie_word_embeddings=True)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("kind", list(ROWS))
def test_loss_gradients_and_metrics_are_those_of_trl(
    kind: str, batch_size: int, accumulation: int, tmp_path: Path
) -> None:
    compare(
        tiny.model,
        ROWS[kind](24),
        tmp_path,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )


@pytest.mark.parametrize("name", ["experts", "tied"])
def test_models_with_more_to_their_loss_or_weights(name: str, tmp_path: Path) -> None:
    compare(MODELS[name], tiny.rows(12), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_beta_is_that_of_trl(tmp_path: Path) -> None:
    compare(tiny.model, tiny.rows(12), tmp_path, per_device_train_batch_size=2, beta=0.7)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_each_kernel_reproduces_trl(kernel: str, tmp_path: Path) -> None:
    theirs, _, _ = run(orpo.ORPOTrainer, orpo.ORPOConfig, tiny.model(), tiny.rows(12), tmp_path / "theirs")
    ours, _, _ = run(
        ORPOTrainer,
        ORPOConfig,
        tiny.model(),
        tiny.rows(12),
        tmp_path / "ours",
        kernel=kernel,
        layout="padded",
        nll_normalization="microbatch",
    )
    for our_step, their_step in zip(ours.gradients, theirs.gradients, strict=True):
        assert_all_within(our_step, their_step, 1e-5)
