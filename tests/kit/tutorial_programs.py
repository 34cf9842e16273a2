"""Runs the programs of examples/tutorials as their readers do, on tiny models and datasets in folders."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.kit import ROOT, tiny
from tests.kit.launching import environment

PROGRAMS = ROOT / "examples" / "tutorials"
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit blocks have 64 weights of one row


def run(folder: Path, *command: str) -> str:
    """Both outputs of `python ...` run in `folder`, which must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment(), "WANDB_MODE": "offline", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def program(name: str, folder: Path) -> str:
    """The path of a program; where Weights & Biases is not installed, of a copy that reports to nobody."""
    path = PROGRAMS / name
    if importlib.util.find_spec("wandb"):
        return str(path)
    copy = folder / name
    copy.write_text(path.read_text().replace('report_to="wandb"', 'report_to="none"'))
    return str(copy)


def base_model(folder: Path) -> str:
    """A saved tiny model whose tokenizer has no chat template."""
    tiny.model(**SIZES).save_pretrained(folder)
    tiny.tokenizer(None).save_pretrained(folder)
    return str(folder)


def chat_model(folder: Path) -> str:
    """A saved tiny model whose tokenizer has one."""
    return tiny.saved(folder, **SIZES)


def dataset(folder: Path, rows: list[dict[str, Any]]) -> str:
    """A folder that `load_dataset` reads, with the splits train and test."""
    folder.mkdir()
    for split, part in (("train", rows), ("test", rows[:4])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return str(folder)


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows as in UltraFeedback: chosen and rejected hold the whole conversation."""
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in tiny.conversations(count)]


def log_of(output: Path) -> list[dict[str, Any]]:
    """The log of the last checkpoint."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    log: list[dict[str, Any]] = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return log
