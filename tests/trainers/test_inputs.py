"""What ORPOTrainer takes: models, datasets and arguments in every form that TRL documents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from orpo_plugins import ORPOCollator, ORPOConfig, ORPOTrainer, errors
from tests.kit import tiny
from tests.kit.training import config, logged, trainer


def test_args_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = ORPOTrainer(
        model=tiny.model(), train_dataset=Dataset.from_list(tiny.rows(4)), processing_class=tiny.tokenizer()
    )
    assert isinstance(made.args, ORPOConfig)
    assert made.args.output_dir == "orpo_output"


def test_model_may_be_a_path_whose_tokenizer_is_used(tmp_path: Path) -> None:
    path = tiny.saved(tmp_path / "model")
    made = trainer(tmp_path / "out", model=path, processing_class=None)
    made.train()
    assert len(logged(made, "loss")) == 3
    assert made.processing_class.eos_token == "</s>"


def test_model_init_kwargs_reach_the_loaded_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=tiny.saved(tmp_path / "model"), model_init_kwargs={"dtype": "bfloat16"})
    assert next(made.model.parameters()).dtype == torch.bfloat16


def test_model_init_kwargs_need_a_path(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="model_init_kwargs is set but model is already instantiated"):
        trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"})


def test_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="model is None: pass a model, the name of one, or model_init"):
        ORPOTrainer(args=config(tmp_path), train_dataset=Dataset.from_list(tiny.rows(4)))


def test_a_model_without_a_path_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="pass processing_class"):
        ORPOTrainer(model=tiny.model(), args=config(tmp_path), train_dataset=Dataset.from_list(tiny.rows(4)))


@pytest.mark.parametrize("takes_trial", [False, True])
def test_model_init_makes_a_fresh_model_for_each_training(takes_trial: bool, tmp_path: Path) -> None:
    def without() -> PreTrainedModel:
        return tiny.model()

    def with_trial(trial: Any) -> PreTrainedModel:
        return tiny.model()

    made = trainer(tmp_path, model_init=with_trial if takes_trial else without)
    first = made.train().training_loss
    assert made.train().training_loss == pytest.approx(first, rel=1e-6)


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    def model() -> PreTrainedModel:
        return tiny.model("Phi", resid_pdrop=0.5)

    def rates(made: ORPOTrainer) -> set[float]:
        return {module.p for module in made.model.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(trainer(tmp_path, model=model())) == {0.0}
    assert 0.5 in rates(trainer(tmp_path, model=model(), disable_dropout=False))


def test_the_old_name_of_the_tokenizer_is_accepted(tmp_path: Path) -> None:
    made = trainer(tmp_path, tokenizer=tiny.tokenizer())
    made.train()
    assert made.processing_class.eos_token == "</s>"


ROWS = {
    "dataset": lambda rows: Dataset.from_list(rows),
    "list": lambda rows: rows,
    "stream": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "generator": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
}


@pytest.mark.parametrize("kind", list(ROWS))
def test_every_kind_of_dataset_trains(kind: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, rows=ROWS[kind](tiny.rows(12)))
    made.train()
    assert len(logged(made, "loss")) == 3


def test_a_stream_and_a_list_take_the_same_steps_in_order(tmp_path: Path) -> None:
    losses = []
    for kind in ("list", "stream"):
        made = trainer(tmp_path, rows=ROWS[kind](tiny.rows(6)), train_sampling_strategy="sequential")
        made.train()
        losses.append(logged(made, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("normalization", ["batch", "microbatch"])
def test_a_streams_next_pass_fills_up_the_step_inside_which_it_ended(normalization: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "max_steps": 5,
        "nll_normalization": normalization,
    }
    # Three passes over five rows are five steps of three.
    streamed = trainer(tmp_path, rows=ROWS["stream"](tiny.rows(5)), **shared)
    streamed.train()
    whole = trainer(tmp_path, rows=tiny.rows(5) * 3, train_sampling_strategy="sequential", **shared)
    whole.train()
    for key in ("loss", "nll_loss", "grad_norm"):
        assert logged(streamed, key) == pytest.approx(logged(whole, key), rel=1e-6)


def test_a_stream_that_ends_inside_the_first_step_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, rows=ROWS["stream"](tiny.rows(5)), gradient_accumulation_steps=8)
    with pytest.raises(errors.ConfigError, match="ends after 3 batches, and gradient_accumulation_steps is 8: lower"):
        made.train()


def test_several_evaluation_sets_are_reported_by_name(tmp_path: Path) -> None:
    sets = {"short": Dataset.from_list(tiny.rows(4)), "long": Dataset.from_list(tiny.rows(4, longest=40))}
    made = trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=3)
    made.train()
    for name in sets:
        assert len(logged(made, f"eval_{name}_rewards/accuracies")) == 1
        assert len(logged(made, f"eval_{name}_loss")) == 1


def test_evaluation_alone_needs_no_training_set(tmp_path: Path) -> None:
    made = ORPOTrainer(
        model=tiny.model(), args=config(tmp_path), eval_dataset=tiny.rows(5), processing_class=tiny.tokenizer()
    )
    metrics = made.evaluate()
    assert metrics["eval_nll_loss"] == pytest.approx(5.8, abs=0.2)
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        made.train()


def test_a_collator_of_ones_own_is_kept(tmp_path: Path) -> None:
    own = ORPOCollator(tiny.tokenizer(), max_length=64, nll_over="completion")
    made = trainer(tmp_path, data_collator=own)
    made.train()
    assert made.data_collator is own


def test_batches_are_not_cut_apart_between_ranks(tmp_path: Path) -> None:
    assert trainer(tmp_path).accelerator.dispatch_batches is False
    with pytest.raises(errors.ConfigError, match="dispatch_batches=True"):
        trainer(tmp_path, accelerator_config={"dispatch_batches": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "quick"}, "unknown kernel 'quick'; known: auto, chunked, chunked_fp32, reference"),
        ({"layout": "stacked"}, "unknown layout 'stacked'; known: auto, packed, padded, seq2seq, shared"),
        ({"nll_over": "answer"}, "unknown nll_over 'answer'"),
        ({"nll_normalization": "mean"}, "unknown nll_normalization 'mean'"),
        ({"beta": -0.1}, "beta is -0.1: .* must be a finite number >= 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": "0.1"}, "beta is '0.1'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, and ORPO's loss smooths no labels"),
        ({"padding_value": -1}, "padding_value is -1: it must be a token id, which is never negative"),
        ({"peft_config": {"r": 4}}, r"peft_config is {'r': 4}: pass a configuration of PEFT, such as LoraConfig"),
        ({"odds_temperature": 0.0}, "odds_temperature is 0.0: it must be a finite number > 0"),
        ({"loss_terms": {"length": 1.0}}, "unknown loss term 'length'"),
        ({"truncation_mode": "keep_middle"}, "unknown truncation_mode 'keep_middle'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 8, "max_prompt_length": 8}, "leaves no room for an answer"),
    ],
)
def test_a_bad_option_is_one_clear_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        trainer(tmp_path, **options)


def test_an_unknown_argument_names_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no option .max_lenght.; did you mean .max_length."):
        config(tmp_path, max_lenght=3)


@pytest.mark.parametrize("name", ["odds_ratio_loss", "get_batch_loss_metrics", "tokenize_row", "concatenated_inputs"])
def test_a_method_of_trls_trainer_that_would_not_be_called_is_refused(name: str) -> None:
    mixin = type("Mine", (), {name: lambda self: None})
    with pytest.raises(errors.ConfigError, match=rf"Mine\.{name} would never be called: .* In its place: "):
        type("Trainer", (mixin, ORPOTrainer), {})
    assert type("Trainer", (ORPOTrainer,), {"log": lambda self: None})
