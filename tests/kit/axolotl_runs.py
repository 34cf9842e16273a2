"""Runs of the real `axolotl` command, and the configs, models and rows for them."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit import tiny
from tests.kit.launching import environment


def needs_axolotl() -> None:
    """Skips the calling module where Axolotl is not installed; importing it here would also load its plugins."""
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("Axolotl is not installed: pip install 'orpo-plugins[axolotl]'", allow_module_level=True)


def axolotl(command: str, config: Path, *arguments: str, succeeds: bool = True) -> str:
    """The log of `axolotl <command> <config> <arguments>`, run beside the config; asserts how it ended."""
    launcher = ["--launcher", "python"] if command in ("train", "evaluate") else []
    words = [str(Path(sys.executable).with_name("axolotl")), command, str(config), *launcher, *arguments]
    run = subprocess.run(words, cwd=config.parent, env=environment(), capture_output=True, text=True, timeout=500)
    log = run.stdout + run.stderr
    assert (run.returncode == 0) == succeeds, log[-3000:]
    return log


def write_config(path: Path, **settings: Any) -> Path:
    """A config that trains a tiny Llama for four steps on the CPU; `settings` replace or add keys."""
    config = {
        "base_model": str(path.parent / "model"),
        "output_dir": "out",
        "plugins": ["orpo_plugins.ORPOPlugin"],
        "rl": "orpo",
        "dataset_prepared_path": "prepared",
        "sequence_len": 256,
        "num_epochs": 1,
        "max_steps": 4,
        "micro_batch_size": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "tf32": False,
        "dataloader_pin_memory": False,
        **settings,
    }
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "lora_target_linear": True}


def dataset(path: Path, **settings: Any) -> dict[str, Any]:
    """An entry of `datasets` for a local file."""
    return {"path": str(path), "ds_type": "json", "split": "train", **settings}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def folder_with_model(folder: Path, **changes: Any) -> Path:
    """The folder, with a saved tiny model in `model`."""
    tiny.saved(folder / "model", **changes)
    return folder


def logged(output: Path) -> list[dict[str, float]]:
    """The Trainer's log, from the newest checkpoint."""
    states = [json.loads(path.read_text()) for path in output.glob("checkpoint-*/trainer_state.json")]
    history: list[dict[str, float]] = max(states, key=lambda state: int(state["global_step"]))["log_history"]
    return history


def argilla(row: dict[str, str]) -> dict[str, Any]:
    user = {"role": "user", "content": row["prompt"]}
    return {name: [user, {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
