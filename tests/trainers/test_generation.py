"""Answers generated during evaluation: how they are made, and where the table ends up, with the real trackers."""

import csv
import importlib.metadata
import importlib.util
import json
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_plugins import ORPOTrainer
from orpo_plugins.integrations.hf_generation import generate
from tests.kit import ROOT, tiny
from tests.kit.launching import environment
from tests.kit.training import trainer

NEW_TOKENS = 5


def made(folder: Path, **options: Any) -> ORPOTrainer:
    """A trainer that evaluates after steps 2 and 4, and generates from two prompts each time."""
    model = options.pop("model", None) or tiny.model()
    model.generation_config.max_new_tokens = NEW_TOKENS
    defaults: dict[str, Any] = {
        "eval_dataset": tiny.rows(6),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 4,
        "generate_during_eval": True,
    }
    return trainer(folder, model=model, **{**defaults, **options})


def evaluated(folder: Path, tracker: str, *commands: str, **variables: str) -> None:
    """Carries out "train" and "evaluate" in a process of its own: trackers read their environment once, on import."""
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed: pip install {tracker}")
    script = ROOT / "tests" / "workers" / "track_generations.py"
    done = subprocess.run(
        [sys.executable, str(script), tracker, str(folder / "out"), *commands],
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert not (folder / "out" / "generations").exists()


def check_tables(tables: list[list[list[str]]]) -> None:
    """Two rows each, [prompt, answer], the prompts from the evaluation set and some answer not empty."""
    prompts = {row["prompt"] for row in tiny.rows(6)}
    for table in tables:
        assert len(table) == 2
        assert {prompt for prompt, _ in table} <= prompts
        assert any(answer for _, answer in table)


# ---- how


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_an_answer_is_that_of_the_models_own_generate(layout: str, tmp_path: Path) -> None:
    ids = tiny.tokenizer()("order parcel invoice").input_ids
    plain = tiny.model().eval()
    expected = plain.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=NEW_TOKENS
    )
    answer = generate(made(tmp_path, layout=layout), [ids], pad=0)
    assert answer[0].tolist() == expected[0, len(ids) :].tolist()


def test_each_further_token_is_a_pass_over_one_token(tmp_path: Path) -> None:
    trainer = made(tmp_path, gradient_checkpointing=True)
    trainer.model.config.use_cache = False  # as transformers leaves it for training
    widths: list[int] = []
    hook = trainer.model.model.embed_tokens.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    trainer.model.eval()
    generate(trainer, [[5, 6, 7], [8, 9, 10, 11]], pad=0)
    hook.remove()
    assert widths[0] == 4
    assert set(widths[1:]) == {1}


def test_a_mixture_of_experts_generates_what_it_does_without_its_routers_loss(tmp_path: Path) -> None:
    ids, plain = [5, 6, 7, 8], tiny.mixture_of_experts().eval()
    plain.config.output_router_logits = False
    expected = plain.generate(torch.tensor([ids]), attention_mask=torch.ones(1, 4).long(), max_new_tokens=NEW_TOKENS)
    trainer = made(tmp_path, model=tiny.mixture_of_experts())
    assert generate(trainer, [ids], pad=0)[0].tolist() == expected[0, 4:].tolist()
    assert trainer.model.config.output_router_logits


def test_training_goes_on_as_without_generation(tmp_path: Path) -> None:
    runs = []
    for generates in (True, False):
        trainer = made(tmp_path / str(generates), generate_during_eval=generates, gradient_checkpointing=True)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == runs[1]


# ---- where


def test_wandb_gets_a_table_of_each_evaluation(tmp_path: Path) -> None:
    evaluated(tmp_path, "wandb", "evaluate", "train", "evaluate", WANDB_MODE="offline")
    files = tmp_path.glob("wandb/offline-run-*/files/media/table/game_log_*.table.json")
    tables = [json.loads(file.read_text()) for file in files]
    assert [table["columns"] for table in tables] == [["Prompt", "Policy"]] * 4
    check_tables([table["data"] for table in tables])


def test_trackio_gets_a_table_of_each_evaluation(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") and importlib.metadata.version("trackio") == "0.19.0":
        pytest.skip("trackio 0.19.0, which Axolotl pins, does not know the arguments that transformers gives it")
    # Its callback ends its run with the training, so that the evaluation after it needs another.
    evaluated(tmp_path, "trackio", "train", "evaluate", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "orpo.db") as database:
        logged = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    tables = [entry["game_log"]["_value"] for entry in logged if "game_log" in entry]
    assert len(tables) == 3
    check_tables([[[row["Prompt"], row["Policy"]] for row in table] for table in tables])


def test_comet_gets_a_table_of_each_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "comet"
    folder.mkdir()
    evaluated(tmp_path, "comet_ml", "train", COMET_START_ONLINE="0", COMET_OFFLINE_DIRECTORY=str(folder))
    with zipfile.ZipFile(next(folder.glob("*.zip"))) as archive:
        texts = [archive.read(name).decode(errors="replace") for name in archive.namelist()]
    tables = [list(csv.reader(text.splitlines())) for text in texts if text.splitlines()[:1] == ["Prompt,Policy"]]
    assert len({str(table) for table in tables}) == 2
    check_tables([table[1:] for table in tables])
    assert any('"fileName":"game_log.csv"' in text for text in texts)
