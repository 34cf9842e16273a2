"""Steps that are taken outside of a Trainer's loop, and figures that stay in the run they belong to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from orpo_plugins import ORPOTrainer, fuse_head, orpo_forward
from tests.kit import tiny
from tests.kit.compare import assert_all_within
from tests.kit.stock import stock
from tests.kit.training import logged, trainer

OPTIONS: dict[str, Any] = {"learning_rate": 0.0, "gradient_accumulation_steps": 4, "max_steps": 2}


def made(folder: Path, kind: str, callbacks: Any = (), **options: Any) -> Any:
    """A trainer whose weights do not change, of either kind."""
    rows = tiny.skewed_rows(24)
    if kind == "ORPOTrainer":
        return trainer(folder, rows=rows, callbacks=list(callbacks), beta=0.2, **{**OPTIONS, **options})
    normalization = options.pop("nll_normalization", "batch")
    stocked = fuse_head(stock(folder, rows=rows, **{**OPTIONS, **options}), nll_normalization=normalization)
    for callback in callbacks:
        stocked.add_callback(callback)
    return stocked


def losses_alone(run: Any, batch: dict[str, Any]) -> list[float]:
    """A batch's loss by `compute_loss` and by `training_step`, whose gradients are thrown away."""
    before = [parameter.grad for parameter in run.model.parameters()]
    with torch.no_grad():
        by_itself = float(run.compute_loss(run.model, batch))
    in_a_step = float(run.training_step(run.model, dict(batch)))
    for parameter, grad in zip(run.model.parameters(), before, strict=True):
        parameter.grad = grad
    return [by_itself, in_a_step]


class Alone(TrainerCallback):
    """Takes a batch's loss at each event of a run."""

    def __init__(self) -> None:
        self.run: Any = None
        self.batch: dict[str, Any] = {}
        self.seen: list[float] = []

    def look(self, *_: Any, **__: Any) -> None:
        self.seen += losses_alone(self.run, self.batch)

    on_train_begin = on_epoch_begin = on_step_begin = on_substep_end = on_step_end = on_log = on_train_end = look


@pytest.mark.parametrize("normalization", ["batch", "microbatch", "pair"])
@pytest.mark.parametrize("kind", ["ORPOTrainer", "fuse_head"])
def test_a_batch_outside_of_the_loop_is_a_step_of_its_own(kind: str, normalization: str, tmp_path: Path) -> None:
    look = Alone()
    run = made(tmp_path, kind, [look], nll_normalization=normalization)
    look.run, look.batch = run, run.data_collator(tiny.skewed_rows(40)[36:39])
    expected = orpo_forward(run.model, look.batch, beta=0.2, nll_normalization=normalization).loss.item()
    assert losses_alone(run, look.batch) == pytest.approx([expected] * 2, rel=1e-5)
    run.train()
    assert losses_alone(run, look.batch) == pytest.approx([expected] * 2, rel=1e-5)
    assert look.seen == pytest.approx([expected] * len(look.seen), rel=1e-5)
    assert len(look.seen) > 20
    # And the run was what it is without being looked at.
    undisturbed = made(tmp_path, kind, nll_normalization=normalization)
    undisturbed.train()
    for key in ("loss", "nll_loss", "rewards/chosen", "answer_tokens/chosen"):
        assert logged(run, key) == pytest.approx(logged(undisturbed, key), rel=1e-6), key


class Stops(TrainerCallback):
    """Ends the first run inside a step."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error: type[BaseException] | None = error

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("kind", ["ORPOTrainer", "fuse_head"])
def test_figures_of_an_interrupted_run_do_not_reach_the_next(
    kind: str, error: type[BaseException], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"logging_steps": 2, "train_sampling_strategy": "sequential"}
    run = made(tmp_path, kind, [Stops(error)], **options)
    with pytest.raises(error):
        run.train()
    logs: dict[str, float] = {"loss": 1.0}
    run.log(logs)
    assert "nll_loss" not in logs
    run.train()
    whole = made(tmp_path, kind, **options)
    whole.train()
    for key in ("nll_loss", "rewards/chosen", "answer_tokens/chosen"):
        assert logged(run, key) == logged(whole, key), key


def test_figures_after_the_last_log_do_not_reach_the_next_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, logging_steps=2, learning_rate=0.0, rows=tiny.rows(6), train_sampling_strategy="sequential")
    run.train()
    first = logged(run, "rewards/chosen")
    run.train()
    assert logged(run, "rewards/chosen") == first


def test_a_second_attempt_with_smaller_batches_begins_anew(tmp_path: Path) -> None:
    class Tight(ORPOTrainer):
        """Has no memory for four pairs at once, which it finds out in the second micro-batch."""

        passes = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.passes += 1
            if self._train_batch_size == 4 and self.passes == 2:
                raise RuntimeError("CUDA out of memory.")
            return loss

    options: dict[str, Any] = {
        "rows": tiny.rows(8),
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.0,
        "max_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    run = trainer(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4, **options)
    run.__class__ = Tight
    run.train()
    size = run._train_batch_size
    assert size < 4
    expected = trainer(tmp_path, per_device_train_batch_size=size, **options)
    expected.train()
    for key in ("loss", "nll_loss", "answer_tokens/chosen"):
        assert logged(run, key) == pytest.approx(logged(expected, key), rel=1e-6), key


class WithSuper(ORPOTrainer):
    """As old examples write it, without the count of items."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs)


class WithModel(ORPOTrainer):
    """Also runs the model on all of the batch that is not labels."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rest = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
        assert set(rest) == {"input_ids", "attention_mask"}
        assert model(**rest).logits.shape[:2] == inputs["input_ids"].shape
        return super().compute_loss(model, inputs, *args, **kwargs)


class WithOwnStep(ORPOTrainer):
    """A whole step of its own, on a copy of the batch."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs({**inputs}), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("kind", [WithSuper, WithModel, WithOwnStep])
def test_subclasses_are_divided_by_the_totals_of_the_step(kind: type[ORPOTrainer], tmp_path: Path) -> None:
    weights = []
    for cls in (ORPOTrainer, kind):
        # Five batches: the last step of an epoch is short.
        run = trainer(
            tmp_path,
            rows=tiny.skewed_rows(10),
            layout="padded",
            max_steps=4,
            gradient_accumulation_steps=3,
            max_grad_norm=0.0,
        )
        run.__class__ = cls
        run.train()
        weights.append({name: parameter.detach() for name, parameter in run.model.named_parameters()})
    assert_all_within(weights[1], weights[0], 1e-7)


def test_an_evaluation_inside_of_training_leaves_its_figures_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logging_steps": 3, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    alone = trainer(tmp_path, **options)
    alone.train()
    beside = trainer(tmp_path, eval_dataset=tiny.rows(4), eval_strategy="steps", eval_steps=1, **options)
    beside.train()
    for key in ("loss", "nll_loss", "rewards/chosen"):
        assert logged(beside, key) == logged(alone, key), key
