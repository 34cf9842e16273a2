"""A stock transformers.Trainer with ORPOCollator and ORPOLoss, and with the fused head put in."""

from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from orpo_plugins import ORPOCollator, ORPOLoss, ORPOTrainer, errors, fuse_head, orpo_forward
from orpo_plugins.data.dataset import prepare_dataset
from tests.kit import tiny
from tests.kit.compare import assert_within
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.encoder_decoder import tokenizer as encoder_decoder_tokenizer
from tests.kit.stock import change, losses, stock
from tests.kit.training import trainer as orpo_trainer

LAYOUTS = ("padded", "packed", "shared")


def test_the_loss_of_one_micro_batch_is_that_of_orpo_forward(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    batch = trainer.data_collator(tiny.rows(4))
    expected = orpo_forward(trainer.model, batch, beta=0.2).loss
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
    tokens = (batch["shift_labels"] != -100).sum()
    for count in (None, tokens):
        loss = ORPOLoss(beta=0.2)(trainer.model(**inputs), batch["labels"], num_items_in_batch=count)
        assert_within(loss.detach(), expected.detach(), 1e-6)


def test_steps_of_one_micro_batch_are_those_of_the_fused_head(tmp_path: Path) -> None:
    expected = change(fuse_head(stock(tmp_path, per_device_train_batch_size=4)))
    assert_within(change(stock(tmp_path, per_device_train_batch_size=4)), expected, 1e-5)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "OPT", "Phi", "GPTNeoX"])
def test_other_families_train(name: str, tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    trainer.model = trainer.model_wrapped = tiny.model(
        name, num_hidden_layers=1, **({"head_dim": 8} if name == "Gemma2" else {})
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] + 0.5


def test_evaluation_reports_the_loss(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    batch = trainer.data_collator(tiny.rows(4)[:2]), trainer.data_collator(tiny.rows(4)[2:])
    expected = sum(float(orpo_forward(trainer.model, part, beta=0.2).loss.detach()) for part in batch) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_packed_batches_need_the_fused_head(layout: str, tmp_path: Path) -> None:
    with pytest.raises(errors.BatchError, match=r"packed into one row.*call fuse_head\(trainer\), or use ORPOCollator"):
        stock(tmp_path, layout=layout).train()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fused_head_works_in_each_layout(layout: str, tmp_path: Path) -> None:
    expected = change(fuse_head(stock(tmp_path)))
    assert_within(change(fuse_head(stock(tmp_path, layout=layout))), expected, 1e-5)


def test_the_fused_head_is_exact_under_gradient_accumulation(tmp_path: Path) -> None:
    rows = tiny.skewed_rows(24)
    whole = change(fuse_head(stock(tmp_path, rows=rows, per_device_train_batch_size=8)))
    cut = change(fuse_head(stock(tmp_path, rows=rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)))
    assert_within(cut, whole, 1e-5)


def test_the_fused_head_brings_the_metrics(tmp_path: Path) -> None:
    trainer = fuse_head(stock(tmp_path))
    trainer.train()
    assert "rewards/accuracies" in trainer.state.log_history[0]
    assert "eval_rewards/accuracies" in trainer.evaluate()


def test_accumulation_without_the_fused_head_is_announced_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = stock(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert caplog.text.count("call orpo_plugins.fuse_head(trainer) for exact pair weights") == 1


def test_the_nll_is_exact_under_accumulation_without_the_fused_head(tmp_path: Path) -> None:
    rows = tiny.skewed_rows(24)
    options: dict[str, Any] = {"rows": rows}
    whole = change(stock(tmp_path, loss=ORPOLoss(beta=0.0), per_device_train_batch_size=8, **options))
    cut = stock(
        tmp_path, loss=ORPOLoss(beta=0.0), per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    assert_within(change(cut), whole, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streams_train_as_their_rows_do(layout: str, tmp_path: Path) -> None:
    from_rows, streamed = stock(tmp_path, layout=layout), stock(tmp_path, layout=layout)
    streamed.train_dataset = streamed.train_dataset.to_iterable_dataset()
    streamed.eval_dataset = streamed.eval_dataset.to_iterable_dataset()
    for trainer in (from_rows, streamed):
        fuse_head(trainer).train()
    assert losses(streamed) == losses(from_rows)
    assert streamed.evaluate()["eval_loss"] == from_rows.evaluate()["eval_loss"]


def test_batches_of_a_stream_that_accelerate_has_cut_are_refused(tmp_path: Path) -> None:
    alone = stock(tmp_path)
    alone.train_dataset = alone.train_dataset.to_iterable_dataset()
    with pytest.raises(errors.BatchError, match="'dispatch_batches': False"):
        alone.train()
    whole = stock(tmp_path, accelerator_config={"dispatch_batches": False})
    whole.train_dataset = whole.train_dataset.to_iterable_dataset()
    whole.train()
    expected = stock(tmp_path)
    expected.train()
    assert losses(whole) == losses(expected)
    with pytest.raises(errors.ConfigError, match="dispatch_batches=True"):
        fuse_head(stock(tmp_path, accelerator_config={"dispatch_batches": True}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loop_of_ones_own_refuses_what_accelerate_has_cut(layout: str) -> None:
    batch = ORPOCollator(tiny.tokenizer(), max_length=512, layout=layout)(tiny.rows(4))
    cut = {
        key: value[: len(batch["input_ids"])] if isinstance(value, Tensor) else value for key, value in batch.items()
    }
    with pytest.raises(errors.BatchError, match="lost targets"):
        orpo_forward(tiny.model(), cut)


def test_one_process_that_sees_several_gpus_trains_on_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = stock(tmp_path)
    trainer.args._n_gpu = 2
    fuse_head(trainer)
    assert trainer.args.n_gpu == 1
    assert "training on one of 2 GPUs" in caplog.text
    trainer.train()
    assert trainer.model_wrapped is trainer.model


def test_fuse_head_wants_our_loss_and_collator(tmp_path: Path) -> None:
    trainer = stock(tmp_path, loss=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum())
    with pytest.raises(errors.ConfigError, match=r"build it with\s+compute_loss_func=ORPOLoss"):
        fuse_head(trainer)


class LossOfOnesOwn(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class StepOfOnesOwn(Trainer):
    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(*args, **kwargs)


class CountOfOnesOwn(Trainer):
    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_num_items_in_batch(*args, **kwargs)


class Derived(LossOfOnesOwn):
    pass


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (LossOfOnesOwn, "LossOfOnesOwn.compute_loss"),
        (StepOfOnesOwn, "StepOfOnesOwn.prediction_step"),
        (CountOfOnesOwn, "CountOfOnesOwn._get_num_items_in_batch"),
        (Derived, "LossOfOnesOwn.compute_loss"),
    ],
)
def test_fuse_head_refuses_a_method_that_would_not_be_called(kind: type[Trainer], method: str, tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    trainer.__class__ = kind
    with pytest.raises(errors.ConfigError, match=rf"{method} would never be called: .* derive from orpo_plugins\.ORPO"):
        fuse_head(trainer)
    # The advice: over ORPOTrainer, or without the method.
    name = method.split(".")[1]
    type("Mine", (ORPOTrainer,), {name: getattr(kind, name)})
    trainer.__class__ = Trainer
    fuse_head(trainer).train()


class Calls(Trainer):
    """Counts the calls of methods that the fused head passes on to."""

    calls: Counter[str]

    def _count(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.calls[name] += 1
        return getattr(super(), name)(*args, **kwargs)


PASSED_ON = (
    "train",
    "training_step",
    "get_batch_samples",
    "get_train_dataloader",
    "evaluate",
    "get_eval_dataloader",
    "_get_eval_sampler",
    "evaluation_loop",
    "log",
    "predict",
    "get_test_dataloader",
)
for name in PASSED_ON:
    setattr(Calls, name, partialmethod(Calls._count, name))


def test_other_methods_of_a_subclass_are_called(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    trainer.__class__, trainer.calls = Calls, Counter()
    rows = trainer.eval_dataset
    fuse_head(trainer).train()
    trainer.args.train_sampling_strategy = "group_by_length"
    trainer.evaluate()
    trainer.predict(rows)
    assert [name for name in PASSED_ON if not trainer.calls[name]] == []


def test_a_loader_of_ones_own_and_batches_by_length_are_one_too_many(tmp_path: Path) -> None:
    class Loads(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return super()._get_train_sampler(*args)

    trainer = stock(tmp_path, train_sampling_strategy="group_by_length")
    trainer.__class__ = Loads
    trainer.train_dataset, _ = prepare_dataset(trainer.train_dataset, tiny.tokenizer())
    fuse_head(trainer)
    with pytest.raises(errors.ConfigError, match=r"Loads\._get_train_sampler would never be called: .*group_by_length"):
        trainer.train()
    trainer.args.train_sampling_strategy = "random"
    trainer.train()


@pytest.mark.parametrize("name", ["compute_loss", "prediction_step", "training_step", "log", "get_batch_samples"])
def test_fuse_head_refuses_a_method_set_on_the_trainer(name: str, tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    setattr(trainer, name, getattr(trainer, name))
    with pytest.raises(errors.ConfigError, match=rf"trainer\.{name} is set on the trainer itself, .*: remove it"):
        fuse_head(trainer)
    delattr(trainer, name)
    fuse_head(trainer).train()


def test_fuse_head_refuses_an_option_set_on_the_trainer(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    trainer.beta = 0.7
    with pytest.raises(errors.ConfigError, match=r"trainer\.beta is set on the trainer itself, .* on ORPOLoss"):
        fuse_head(trainer)


def test_fuse_head_is_called_once(tmp_path: Path) -> None:
    trainer = fuse_head(stock(tmp_path))
    for fused in (trainer, orpo_trainer(tmp_path)):
        with pytest.raises(errors.ConfigError, match="has the fused head already: leave fuse_head out"):
            fuse_head(fused)
    with pytest.raises(errors.ConfigError, match=r"LlamaForCausalLM is no transformers\.Trainer: .* orpo_forward"):
        fuse_head(trainer.model)


def test_trls_trainers_are_refused_by_name(tmp_path: Path) -> None:
    sft = pytest.importorskip("trl").SFTTrainer
    trainer = stock(tmp_path)
    trainer.__class__ = sft
    with pytest.raises(errors.ConfigError, match=r"SFTTrainer\.compute_loss would never be called"):
        fuse_head(trainer)


def test_a_sequence_to_sequence_trainer_may_not_generate(tmp_path: Path) -> None:
    def build(**options: Any) -> Trainer:
        args = Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False, **options
        )
        return Seq2SeqTrainer(
            without_dropout(encoder_decoder("t5")),
            args,
            train_dataset=tiny.rows(8),
            eval_dataset=tiny.rows(4),
            data_collator=ORPOCollator(encoder_decoder_tokenizer(), layout="seq2seq"),
            compute_loss_func=ORPOLoss(),
        )

    trainer = fuse_head(build())
    trainer.train()
    assert "eval_rewards/accuracies" in trainer.evaluate()
    with pytest.raises(errors.ConfigError, match="predict_with_generate=True has no effect"):
        fuse_head(build(predict_with_generate=True))


def test_labels_that_are_not_the_collators_are_refused(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    outputs = trainer.model(input_ids=torch.arange(3, 15).view(2, 6))
    with pytest.raises(errors.BatchError, match="use ORPOCollator as the data collator"):
        ORPOLoss()(outputs, torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(errors.BatchError, match=r"the batch has no labels: pass data_collator=ORPOCollator"):
        ORPOLoss()(outputs, None)


def test_a_model_that_returns_no_logits_is_refused() -> None:
    with pytest.raises(errors.BatchError, match="use_liger_kernel=True"):
        ORPOLoss()({"logits": None}, torch.zeros(3, 4, dtype=torch.long))


def without_dropout(model: Any) -> Any:
    """The model, in which training mode changes nothing."""
    for module in model.modules():
        for name in ("dropout", "dropout_rate", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def stock_encoder_decoder(folder: Path, name: str = "bart", layout: str = "seq2seq", **options: Any) -> Trainer:
    """The same around an encoder-decoder model."""
    trainer = stock(folder, **options)
    trainer.model = trainer.model_wrapped = without_dropout(encoder_decoder(name))
    trainer.data_collator = ORPOCollator(encoder_decoder_tokenizer(), max_length=512, layout=layout)
    return trainer


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_model_trains_with_the_fused_head(name: str, tmp_path: Path) -> None:
    trainer = fuse_head(stock_encoder_decoder(tmp_path, name, max_steps=1))
    batch = trainer.data_collator(tiny.rows(16)[:2])
    reference = without_dropout(encoder_decoder(name))
    expected = orpo_forward(reference, batch, beta=0.2, kernel="reference").loss
    expected.backward()
    trainer.train()
    assert losses(trainer) == [pytest.approx(float(expected.detach()), rel=1e-6)]
    changed = {key: p.detach() for key, p in trainer.model.named_parameters()}
    for key, parameter in reference.named_parameters():
        if parameter.grad is not None:
            assert_within(changed[key], parameter.detach() - parameter.grad, 1e-5, key)


@pytest.mark.parametrize("layout", ["padded", "seq2seq"])
def test_an_encoder_decoder_model_without_the_fused_head_is_refused(layout: str, tmp_path: Path) -> None:
    message = r"encoder-decoder model's decoder needs inputs .* layout='seq2seq'\) and call fuse_head\(trainer\)"
    with pytest.raises(errors.BatchError, match=message):
        stock_encoder_decoder(tmp_path, layout=layout).train()


def test_an_encoder_decoder_model_under_the_fused_head_needs_its_layout(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        trainer = fuse_head(stock_encoder_decoder(tmp_path, "t5", layout=layout))
        with pytest.raises(errors.BatchError, match=r"T5For.* make it with ORPOCollator\(\.\.\., layout='seq2seq'\)"):
            trainer.train()


@pytest.mark.parametrize("fused", [False, True])
def test_a_decoder_refuses_batches_for_an_encoder_decoder_model(fused: bool, tmp_path: Path) -> None:
    trainer = stock(tmp_path, layout="seq2seq")
    with pytest.raises(errors.BatchError, match=r"for an encoder-decoder model, but .* layout='padded'"):
        (fuse_head(trainer) if fused else trainer).train()
