"""Runs a script of tests/workers in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """This process's environment, offline, one thread, with the package importable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_worker(script: str, runs: list[dict[str, Any]], output: Path, *, ranks: int) -> list[Any]:
    """What the worker saved after it trained with each of `runs` on so many gloo ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tests" / "workers" / script), json.dumps(runs), str(output)]
    done = subprocess.run(command, env=environment(), cwd=output.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    results: list[Any] = torch.load(output, weights_only=False)
    return results


def leave() -> NoReturn:
    """Ends a rank whose results are saved, without taking the interpreter down.

    A thread of gloo frees the tensors of the last collective some time after every rank has its result. If Python is
    already being torn down by then, the thread asks for the interpreter's lock, is ended while it waits, and takes
    the process with it ("terminate called without an active exception").
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
