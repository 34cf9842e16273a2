"""Runs a script of tests/workers in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.kit import ROOT


def environment() -> dict[str, str]:
    """This process's environment with the package importable, one thread, offline, and without Axolotl's telemetry."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",  # else, without a network, the command never exits
        "TOKENIZERS_PARALLELISM": "false",
    }


# A thread of gloo frees the tensors of the last collective after every rank has its result. If Python is being torn
# down by then, the thread is ended while it waits for the interpreter's lock, and aborts the process with this word.
ABORTED_ON_LEAVING = "terminate called without an active exception"


def run_python(words: list[str], folder: Path) -> None:
    """Runs the interpreter in `folder`; again, at most twice, where torch aborted a rank whose work was done."""
    command = [sys.executable, *words]
    for _ in range(3):
        done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=300)
        if ABORTED_ON_LEAVING not in done.stderr:
            break
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def run_worker(script: str, runs: list[dict[str, Any]], output: Path, *, ranks: int) -> list[Any]:
    """What the worker saved after it trained with each of `runs` on so many gloo ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    run_python([*launcher, str(ROOT / "tests" / "workers" / script), json.dumps(runs), str(output)], output.parent)
    results: list[Any] = torch.load(output, weights_only=False)
    return results


def unsharded(models: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What train_fsdp2.py changes in each model on one process: the whole step at once, and nothing computed twice."""
    runs = [{**options, "checkpointing": False, "batch_size": 8} for options in models.values()]
    return dict(zip(models, run_worker("train_fsdp2.py", runs, folder / "results", ranks=1), strict=True))
