"""A run from start to end: metrics, evaluation, checkpoints, resuming, saving."""

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

import orpo_plugins
from orpo_plugins import ORPOTrainer, errors, hookimpl
from orpo_plugins.hooks.plugins import get_plugin_manager
from orpo_plugins.hooks.types import Metric
from tests.kit import tiny
from tests.kit.compare import assert_all_within
from tests.kit.training import logged, trainer

KEYS_OF_TRL = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
]
OUR_KEYS = ["answer_tokens/chosen", "answer_tokens/rejected"]


def weights(made: ORPOTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


@pytest.mark.parametrize("layout", ["auto", "padded", "packed", "shared"])
def test_every_figure_is_logged_in_training_and_evaluation(layout: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, layout=layout, eval_dataset=tiny.rows(5), eval_strategy="steps", eval_steps=3)
    made.train()
    for key in KEYS_OF_TRL + OUR_KEYS:
        assert len(logged(made, key)) == 3, key
        assert len(logged(made, f"eval_{key}")) == 1, key


def test_the_router_loss_is_logged(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=tiny.mixture_of_experts())
    made.train()
    assert all(value > 0 for value in logged(made, "aux_loss"))


def test_figures_are_means_over_all_pairs_since_the_last_log(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 0.0, "train_sampling_strategy": "sequential", "max_steps": 2}
    once = trainer(tmp_path, logging_steps=2, **options)
    once.train()
    each = trainer(tmp_path, logging_steps=1, **options)
    each.train()
    for key in ("rewards/chosen", "log_odds_ratio", "answer_tokens/chosen"):
        assert logged(once, key) == [pytest.approx(np.mean(logged(each, key)), rel=1e-6)]


def test_the_answers_tokens_are_counted(tmp_path: Path) -> None:
    rows = tiny.rows(2)
    made = trainer(tmp_path, rows=rows, max_steps=1)
    made.train()
    tokenizer = tiny.tokenizer()
    lengths = [len(tokenizer(row["chosen"]).input_ids) + 1 for row in rows]  # and EOS
    assert logged(made, "answer_tokens/chosen") == [pytest.approx(np.mean(lengths))]


def test_a_plugins_metric_is_logged(tmp_path: Path) -> None:
    class Plugin:
        @hookimpl
        def orpo_metrics(self) -> list[Metric]:
            return [Metric(name="sure", compute=lambda out: (out.chosen_logps > -1.0).float())]

    plugin = Plugin()
    get_plugin_manager().register(plugin)
    try:
        made = trainer(tmp_path, eval_dataset=tiny.rows(3))
        made.train()
        assert logged(made, "sure") == [0.0, 0.0, 0.0]
        assert made.evaluate()["eval_sure"] == 0.0
    finally:
        get_plugin_manager().unregister(plugin)


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    sizes = {}
    for size in (1, 2, 7):
        made = trainer(tmp_path, eval_dataset=tiny.rows(7, longest=40), per_device_eval_batch_size=size)
        sizes[size] = made.evaluate()
    for key in ("eval_loss", "eval_nll_loss", "eval_rewards/margins", "eval_log_odds_ratio", "eval_logps/chosen"):
        # Margins are small differences of large numbers, hence the second tolerance.
        assert sizes[1][key] == pytest.approx(sizes[7][key], rel=1e-5, abs=1e-6), key
        assert sizes[2][key] == pytest.approx(sizes[7][key], rel=1e-5, abs=1e-6), key


def test_predictions_are_both_answers_log_probabilities(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"best": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    made = trainer(tmp_path, eval_dataset=tiny.rows(5), compute_metrics=compute_metrics)
    metrics = made.evaluate()
    assert seen[0].predictions.shape == (5, 2)
    assert metrics["eval_best"] == pytest.approx(metrics["eval_rewards/accuracies"])
    assert seen[0].predictions[:, 0].mean() == pytest.approx(metrics["eval_logps/chosen"], rel=1e-5)
    assert made.predict(made.eval_dataset).predictions.shape == (5, 2)


def test_the_best_model_is_chosen_by_a_figure_of_ours(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        eval_dataset=tiny.rows(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=True,
        learning_rate=0.5,
    )
    made.train()
    assert made.state.best_metric == max(logged(made, "eval_rewards/margins"))
    assert made.evaluate()["eval_rewards/margins"] == pytest.approx(made.state.best_metric, rel=1e-5)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 6,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", model=tiny.model(seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_all_within(weights(resumed), weights(whole), 1e-6)
    assert logged(resumed, "loss")[3:] == pytest.approx(logged(whole, "loss")[3:], rel=1e-6)


def test_a_saved_model_loads_with_its_tokenizer(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    made.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert_all_within(dict(loaded.named_parameters()), weights(made), 0.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == tiny.CHAT_TEMPLATE


def test_the_model_card_names_the_method_and_the_dataset(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.create_model_card(dataset_name="customers/answers", tags="demo")  # as TRL's push_to_hub passes it
    card = (tmp_path / "README.md").read_text()
    assert all(word in card for word in ("- orpo", "- demo", "customers/answers"))


@pytest.mark.parametrize("hidden_by_filter", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run(hidden_by_filter: bool, tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    made = trainer(tmp_path, model=model, layout="padded", kernel="reference", logging_nan_inf_filter=hidden_by_filter)
    with pytest.raises(errors.ModelError, match=r"not finite at step 1: .*nll_loss=nan.*lower learning rate"):
        made.train()


class Synchronizations(TorchDispatchMode):
    """Notes which functions of the package wait for a device: for a scalar, or a shape that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self, package: Path = Path(orpo_plugins.__file__).parents[1]) -> None:
        super().__init__()
        self.package = str(package)
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # A boolean index is a nonzero in disguise.
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.startswith(self.NAMES) or masked:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Synchronizations":
        # These reach the dispatcher as a copy, or not at all.
        self.originals = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy")}
        for name, method in self.originals.items():
            setattr(
                torch.Tensor, name, lambda *args, _name=name, _method=method: (self._note(_name), _method(*args))[1]
            )
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for name, method in self.originals.items():
            setattr(torch.Tensor, name, method)

    def _note(self, name: str) -> None:
        torch_root = str(Path(torch.__file__).parent)
        hidden = ("__torch_dispatch__", "<lambda>", "_note")
        stack = [frame for frame in traceback.extract_stack() if frame.name not in hidden]
        frames = [frame for frame in stack if not frame.filename.startswith(torch_root)]
        last = frames[-1].filename
        # transformers has some of its own, also where a virtual environment stands inside the repository.
        if last.startswith(self.package) and "site-packages" not in last:
            self.seen.append(frames[-1].name)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_micro_batch_waits_for_the_device(split: str, layout: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, layout=layout, kernel="chunked", eval_dataset=tiny.rows(4))
    made.train()  # layout check and probe are over, once per run
    batch = made.data_collator([made.train_dataset[index] for index in range(3)])
    with Synchronizations() as found:
        if split == "train":
            made.compute_loss(made.model, batch).backward()
        else:
            made.prediction_step(made.model, batch, prediction_loss_only=False)
    # The first two look at values only where the tensor is on a CPU; on a GPU the others are not needed before the
    # gradient of the hidden states takes 256 MiB.
    assert set(found.seen) <= {"check_vocabulary", "backward", "_sort_targets", "_move"}


def test_the_synchronization_counter_counts() -> None:
    with Synchronizations() as found:
        torch.ones(3).sum().item()
        torch.arange(3)[torch.tensor([True, False, True])]
        bool(torch.ones(()))
        torch.ones(3).tolist()
    assert len(found.seen) >= 4


def test_answers_generated_in_evaluation_are_written_to_a_file(tmp_path: Path) -> None:
    model = tiny.model()
    model.generation_config.max_new_tokens = 5
    made = trainer(
        tmp_path,
        model=model,
        rows=Dataset.from_list(tiny.rows(12)),
        eval_dataset=tiny.rows(6),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        generate_during_eval=True,
        per_device_eval_batch_size=3,
    )
    made.train()
    prompts = {row["prompt"] for row in tiny.rows(6)}
    tables = []
    for step in (2, 4):
        table = json.loads((tmp_path / "generations" / f"step-{step}.json").read_text())
        assert len(table) == 3
        assert all(set(row) == {"Prompt", "Policy"} and row["Prompt"] in prompts for row in table)
        tables.append([row["Prompt"] for row in table])
    assert tables[0] != tables[1]


def test_generation_from_padded_prompts_is_that_of_each_prompt_alone(tmp_path: Path) -> None:
    from orpo_plugins.integrations.hf_generation import generate

    model = tiny.model()
    model.generation_config.max_new_tokens = 6
    made = trainer(tmp_path, model=model)
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer(text).input_ids for text in ("refund", "order parcel invoice today please", "sorry desk")]
    together = generate(made, prompts, tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        alone = generate(made, [prompt], tokenizer.pad_token_id)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_generated_answers_go_to_an_active_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orpo_plugins.integrations import hf_generation as generation

    tables: list[Any] = []
    monkeypatch.setitem(generation._TRACKERS, "wandb", lambda rows: tables.append(rows) or True)
    made = trainer(tmp_path, eval_dataset=tiny.rows(4), generate_during_eval=True)
    made.args.report_to = ["wandb"]
    made.evaluate()
    assert len(tables[0]) == 2
    assert not (tmp_path / "generations").exists()
