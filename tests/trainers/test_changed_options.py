"""Options that change after a trainer is built: by a callback, a search, an assignment."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from orpo_plugins import ORPOCollator, ORPOLoss, ORPOTrainer, errors, fuse_head, orpo_forward
from orpo_plugins.integrations.hf_changed_options import FIXED_OPTIONS, LOSS_OPTIONS, RUN_OPTIONS
from orpo_plugins.options import ORPOOptions
from tests.kit import tiny
from tests.kit.stock import change, losses, stock
from tests.kit.training import logged, trainer

STILL: dict[str, Any] = {"learning_rate": 0.0, "train_sampling_strategy": "sequential"}
"""Steps that change no weight, over the same rows each time."""
CHANGES: dict[str, Any] = {
    "beta": 0.7,
    "odds_temperature": 3.0,
    "nll_normalization": "pair",
    "kernel": "reference",
    "memory_budget": 1000,
}


class SetAt(TrainerCallback):
    """Sets an attribute of `target` when the given step ends."""

    def __init__(self, target: Any, step: int, **values: Any) -> None:
        self.target, self.step, self.values = target, step, values

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for name, value in self.values.items():
                setattr(self.target or args, name, value)


def steps(folder: Path, callbacks: Any = (), **options: Any) -> list[float]:
    made = trainer(folder, callbacks=list(callbacks), rows=tiny.rows(6), **STILL, **options)
    made.train()
    return logged(made, "loss")


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "memory_budget"])
def test_an_option_of_the_loss_that_a_callback_sets_holds_from_the_next_step(name: str, tmp_path: Path) -> None:
    before, after = steps(tmp_path), steps(tmp_path, **{name: CHANGES[name]})
    changed = steps(tmp_path, [SetAt(None, 1, **{name: CHANGES[name]})])
    assert changed == pytest.approx([before[0], *after[1:]], rel=1e-6)


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_of_the_loss_may_be_set_on_the_trainer(name: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, rows=tiny.rows(6), eval_dataset=tiny.rows(4), **STILL)
    setattr(made, name, CHANGES[name])
    assert getattr(made.args, name) == getattr(made, name) == CHANGES[name]
    made.train()
    built = trainer(tmp_path, rows=tiny.rows(6), eval_dataset=tiny.rows(4), **STILL, **{name: CHANGES[name]})
    built.train()
    assert logged(made, "loss") == logged(built, "loss")
    assert made.evaluate()["eval_loss"] == built.evaluate()["eval_loss"]
    assert set(CHANGES) | {"loss_terms"} == set(LOSS_OPTIONS)


@pytest.mark.parametrize("normalization", ["batch", "microbatch", "pair"])
def test_the_normalization_may_change_under_gradient_accumulation(normalization: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": tiny.skewed_rows(18), "gradient_accumulation_steps": 3, "max_grad_norm": 1e9}
    norms = []
    for start in ("batch", "microbatch", normalization):
        made = trainer(tmp_path, nll_normalization=start, **{**STILL, **options})
        made.nll_normalization = normalization
        made.train()
        norms.append(logged(made, "grad_norm"))
    assert norms[0] == pytest.approx(norms[2], rel=1e-6)
    assert norms[1] == pytest.approx(norms[2], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", -1.0, "beta is -1.0: .* must be a finite number >= 0"),
        ("odds_temperature", 0.0, "odds_temperature is 0.0: it must be a finite number > 0"),
        ("kernel", "quick", "unknown kernel 'quick'; known: auto, chunked"),
        ("nll_normalization", "mean", "unknown nll_normalization 'mean'"),
        ("loss_terms", {"length": 1.0}, "unknown loss term 'length'"),
        ("layout", "stacked", "unknown layout 'stacked'"),
        ("nll_over", "answer", "unknown nll_over 'answer'"),
    ],
)
def test_a_bad_value_is_the_error_of_construction(name: str, value: Any, message: str, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with pytest.raises(errors.ConfigError, match=message):
        setattr(made, name, value)
    made.train()  # nothing has changed
    setattr(made.args, name, value)
    with pytest.raises(errors.ConfigError, match=message):
        made.train()


@pytest.mark.parametrize("name", FIXED_OPTIONS)
def test_what_data_and_model_were_made_with_cannot_change(name: str, tmp_path: Path) -> None:
    message = rf"{name} was .* when the trainer was built and is to be .*: set it back, or build a new ORPOTrainer"
    made = trainer(tmp_path, eval_dataset=tiny.rows(4))
    before = getattr(made.args, name)
    with pytest.raises(errors.ConfigError, match=message):
        setattr(made, name, 512)
    setattr(made.args, name, 512)
    for call in (made.train, made.evaluate):
        with pytest.raises(errors.ConfigError, match=message):
            call()
    setattr(made.args, name, before)
    made.train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layout", "padded"),
        ("nll_over", "completion"),
        ("max_tokens_per_batch", 400),
        ("step_strategy", "tokens"),
        ("layout_check", False),
        ("show_example", False),
    ],
)
@pytest.mark.parametrize("on", ["args", "trainer"])
def test_some_options_are_applied_when_a_run_begins(name: str, value: Any, on: str, tmp_path: Path) -> None:
    limit = {"max_tokens_per_batch": 400} if name == "step_strategy" else {}
    options: dict[str, Any] = {"rows": tiny.rows(12), "max_steps": 3, **limit}
    made = trainer(tmp_path, **options)
    made.train()
    first = len(logged(made, "loss"))
    setattr(made if on == "trainer" else made.args, name, value)
    expected = trainer(tmp_path, **options)
    expected.train()
    again = trainer(tmp_path, model=expected.model, **{**options, name: value})
    made.train()
    again.train()
    assert first == 3
    assert logged(made, "loss") == logged(again, "loss")
    assert made.data_collator.layout.name == again.data_collator.layout.name
    others = {"layout", "nll_over", "max_tokens_per_batch", "step_strategy", "layout_check"}
    assert set(RUN_OPTIONS) == {*others, "show_example"}


def test_a_new_layout_is_compared_with_padded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    made = trainer(tmp_path, layout="packed")
    made.train()
    made.layout = "shared"
    made.train()
    assert "layout 'packed' agrees with 'padded'" in caplog.text
    assert "layout 'shared' agrees with 'padded'" in caplog.text


@pytest.mark.parametrize("name", RUN_OPTIONS)
def test_during_a_run_they_cannot_change(name: str, tmp_path: Path) -> None:
    value = {"layout": "padded", "nll_over": "completion", "step_strategy": "tokens", "layout_check": False}.get(
        name, 400
    )
    made = trainer(tmp_path, callbacks=[SetAt(None, 1, **{name: value})], rows=tiny.rows(12))
    with pytest.raises(errors.ConfigError, match=rf"{name} was .* when the run began and is .* set it before"):
        made.train()
    if name == "step_strategy":
        made.args.max_tokens_per_batch = 400
    made.train()  # the advice


def test_a_layout_cannot_change_where_the_collator_is_ones_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, data_collator=ORPOCollator(tiny.tokenizer(), layout="padded"))
    made.args.layout = "packed"
    with pytest.raises(errors.ConfigError, match="layout changed in the arguments, but data_collator, .* decides"):
        made.train()


def test_a_change_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, callbacks=[SetAt(None, 2, beta=0.3)])
    made.args.beta = 0.2
    made.args.layout = "padded"
    made.train()
    lines = [line for line in caplog.messages if line.startswith("ORPO by orpo-plugins is active: ")]
    assert lines[0].endswith("beta=0.1")
    assert lines[1:] == [
        "ORPO by orpo-plugins is active: beta=0.2 (was 0.1), layout='padded' (was 'auto')",
        "ORPO by orpo-plugins is active: beta=0.3 (was 0.2)",
    ]


def test_the_loss_of_an_evaluation_is_that_of_the_options_then(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=tiny.rows(4))
    values = []
    for beta in (0.1, 2.0):
        made.args.beta = beta
        metrics = made.evaluate()
        assert metrics["eval_loss"] == pytest.approx(
            metrics["eval_nll_loss"] - beta * metrics["eval_log_odds_ratio"], rel=1e-6
        )
        values.append(metrics["eval_loss"])
    assert values[1] > values[0] + 1


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("orpo_alpha", "it is beta now"),
        ("label_pad_token_id", "pass it to"),
        ("is_encoder_decoder", "read from the model"),
    ],
)
def test_an_old_name_that_is_set_is_an_error(name: str, advice: str, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    for target in (made, made.args):
        with pytest.raises(errors.ConfigError, match=rf"{name}.* would have no effect: {advice}"):
            setattr(target, name, 3)


# ---- fuse_head, ORPOLoss


@pytest.mark.parametrize("how", ["loss.beta", "loss.options", "trainer.beta"])
def test_the_loss_of_a_stock_trainer_may_change(how: str, tmp_path: Path) -> None:
    loss = ORPOLoss(beta=0.2)
    made = fuse_head(stock(tmp_path, loss=loss, learning_rate=0.0))
    if how == "loss.options":
        loss.options = ORPOOptions(beta=0.9)
    else:
        (loss if how == "loss.beta" else made).beta = 0.9
    expected = fuse_head(stock(tmp_path, loss=ORPOLoss(beta=0.9), learning_rate=0.0))
    for each in (made, expected):
        each.train()
    assert losses(made) == losses(expected)
    assert made.beta == loss.beta == 0.9


def test_another_loss_may_be_set_where_it_is_ours(tmp_path: Path) -> None:
    made, expected = fuse_head(stock(tmp_path)), fuse_head(stock(tmp_path, loss=ORPOLoss(beta=0.9)))
    made.compute_loss_func = ORPOLoss(beta=0.9)
    assert torch.equal(change(made), change(expected))
    for fused in (made, trainer(tmp_path)):
        with pytest.raises(errors.ConfigError, match=r"compute_loss_func=.* would never be called"):
            fused.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()


def test_without_the_fused_head_too(tmp_path: Path) -> None:
    loss = ORPOLoss()
    made = stock(tmp_path, loss=loss, learning_rate=0.0, max_steps=1)
    loss.beta, loss.odds_temperature = 0.9, 2.0
    expected = orpo_forward(made.model, made.data_collator(tiny.rows(16)[:2]), beta=0.9, odds_temperature=2.0).loss
    made.train()
    assert losses(made) == pytest.approx([float(expected.detach())], rel=1e-5)
    with pytest.raises(errors.ConfigError, match="beta is -1"):
        loss.beta = -1


def test_kernel_and_normalization_of_a_fused_trainer_may_change(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": tiny.skewed_rows(16), "gradient_accumulation_steps": 2}
    made = fuse_head(stock(tmp_path, **options))
    made.nll_normalization, made.kernel = "microbatch", "reference"
    expected = fuse_head(stock(tmp_path, **options), nll_normalization="microbatch", kernel="reference")
    assert torch.equal(change(made), change(expected))
    with pytest.raises(errors.ConfigError, match="unknown kernel 'quick'"):
        made.kernel = "quick"
    with pytest.raises(errors.ConfigError, match="unknown kernel 'quick'"):
        fuse_head(stock(tmp_path), kernel="quick")
    made.orpo_loss.options = ORPOOptions(nll_normalization="pair")
    with pytest.raises(errors.ConfigError, match=r"'pair' and the trainer 'microbatch', .* set trainer\.nll_norm"):
        made.train()


def test_two_trainers_with_one_model_have_options_of_their_own(tmp_path: Path) -> None:
    model = tiny.model()
    first, second = (trainer(tmp_path, model=model, rows=tiny.rows(6), **STILL) for _ in range(2))
    first.beta = 0.9
    second.train()
    first.train()
    assert logged(second, "loss") == pytest.approx(steps(tmp_path), rel=1e-6)
    assert logged(first, "loss") == pytest.approx(steps(tmp_path, beta=0.9), rel=1e-6)


# ---- hyperparameter_search


def search(folder: Path, space: Any, **options: Any) -> tuple[list[float], ORPOTrainer, Any]:
    """The objectives of three trials, the trainer, and the best run."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    values: list[float] = []

    def init() -> PreTrainedModel:
        return tiny.model()

    shared: dict[str, Any] = {"eval_dataset": tiny.rows(4), "rows": tiny.rows(12), **options}
    made = trainer(folder, model_init=init, **shared)
    best = made.hyperparameter_search(
        space,
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"x": [0, 1, 2]}, seed=0),
        study_name="s",
        storage=(storage := optuna.storages.InMemoryStorage()),
    )
    values += [trial.value for trial in sorted(storage.get_all_trials(0), key=lambda trial: trial.params["x"])]
    return values, made, best


@pytest.mark.parametrize("stream", [False, True])
def test_trials_over_beta_differ_and_are_those_of_trainers_built_so(stream: bool, tmp_path: Path) -> None:
    rows: Any = Dataset.from_list(tiny.rows(12))
    rows = rows.to_iterable_dataset() if stream else rows
    betas = [0.1, 1.0, 4.0]
    values, _, best = search(
        tmp_path, lambda trial: {"beta": betas[trial.suggest_categorical("x", [0, 1, 2])]}, rows=rows
    )
    expected = []
    for beta in betas:
        made = trainer(tmp_path, model_init=lambda: tiny.model(), rows=rows, eval_dataset=tiny.rows(4), beta=beta)
        made.train()
        expected.append(made.evaluate()["eval_loss"])
    assert values == pytest.approx(expected, rel=1e-6)
    assert len(set(values)) == 3
    assert best.objective == min(values)


def test_the_objective_over_several_sets_is_the_mean_of_their_losses(tmp_path: Path) -> None:
    sets = {"nll": tiny.rows(4), "long": tiny.rows(4, longest=40)}
    values, made, _ = search(
        tmp_path, lambda trial: {"odds_temperature": 1.0 + trial.suggest_categorical("x", [0, 1, 2])}, eval_dataset=sets
    )
    made = trainer(tmp_path, model_init=lambda: tiny.model(), rows=tiny.rows(12), eval_dataset=sets)
    made.train()
    metrics = made.evaluate()
    assert values[0] == pytest.approx((metrics["eval_nll_loss"] + metrics["eval_long_loss"]) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_length", "max_length was 1024 .* the rows were tokenized with the old value: .* one for each value"),
        ("orpo_alpha", "the search sets 'orpo_alpha', which ORPOConfig does not have; did you mean 'beta'"),
        ("learning_rat", "which ORPOConfig does not have; did you mean 'learning_rate'"),
    ],
)
def test_a_search_over_what_cannot_change_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        search(tmp_path, lambda trial: {name: 8 + trial.suggest_categorical("x", [0, 1, 2])})


def test_a_stock_trainers_search_over_beta_is_refused(tmp_path: Path) -> None:
    made = stock(tmp_path)
    made.model_init = lambda: tiny.model()
    fuse_head(made)
    with pytest.raises(
        errors.ConfigError, match="sets 'beta', which TrainingArguments does not have: search with ORPO"
    ):
        made.hyperparameter_search(lambda trial: {"beta": trial.suggest_float("beta", 0.1, 1.0)}, backend="optuna")


@pytest.mark.parametrize(("name", "where"), [("beta", "set trainer.beta"), ("max_length", "pass it to ORPOCollator")])
def test_an_option_among_a_stock_trainers_arguments_is_an_error(name: str, where: str, tmp_path: Path) -> None:
    made = fuse_head(stock(tmp_path))
    setattr(made.args, name, 0.5)
    with pytest.raises(errors.ConfigError, match=f"args.{name}=0.5 would have no effect under fuse_head: {where}"):
        made.train()
    delattr(made.args, name)
    made.beta = 0.5  # the advice
    made.train()


@pytest.mark.parametrize("name", ["layout", "max_length", "train_on"])
def test_an_option_that_a_stock_trainer_has_not_is_an_error(name: str, tmp_path: Path) -> None:
    made = fuse_head(stock(tmp_path))
    with pytest.raises(
        errors.ConfigError, match=f"trainer.{name}='x' would have no effect: it is an option of ORPOCol"
    ):
        setattr(made, name, "x")


@pytest.mark.parametrize("name", ["kernel", "nll_normalization", "max_length", "orpo_alpha"])
def test_an_option_that_a_loss_function_has_not_is_an_error(name: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"{name}='x' would have no effect on an ORPOLoss, which has beta and"):
        setattr(ORPOLoss(), name, "x")


def test_label_smoothing_that_is_set_later_is_an_error(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.args.label_smoothing_factor = 0.1
    with pytest.raises(errors.ConfigError, match="label_smoothing_factor is 0.1, and ORPO's loss smooths no labels"):
        made.train()


@pytest.mark.parametrize("name", ["options", "tokenizer", "max_length"])
def test_what_a_collator_was_made_with_stays(name: str) -> None:
    collator = ORPOCollator(tiny.tokenizer())
    with pytest.raises(errors.ConfigError, match=f"{name}=8 would have no effect on an existing collator"):
        setattr(collator, name, 8)


def test_a_collators_layout_goes_by_its_name_too() -> None:
    collator = ORPOCollator(tiny.tokenizer())
    collator.layout = "packed"
    expected = ORPOCollator(tiny.tokenizer(), layout="packed")(tiny.rows(2))
    assert torch.equal(collator(tiny.rows(2))["input_ids"], expected["input_ids"])
    with pytest.raises(errors.ConfigError, match="unknown layout 'x'; known: auto, "):
        collator.layout = "x"
    with pytest.raises(errors.ConfigError, match="pad_to_multiple_of=8 needs layout='padded'"):
        collator.pad_to_multiple_of = 8
