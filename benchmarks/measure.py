"""What the benchmarks share: time and peak memory, child processes, the machine, results and plots.

Time and memory are by hand.  `torch.utils.benchmark.Timer` runs what it measures two times more for each repetition,
which takes minutes where one step takes seconds.  psutil has neither the peak of a process on Linux nor the name of a
CPU.
"""

import ctypes
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CUDA = torch.cuda.is_available()


def now() -> float:
    """Process time of all threads on a CPU; on a GPU elapsed time, once it has done all that it was given."""
    return float(benchmark.timer()) if CUDA else time.process_time()


def peak_bytes() -> int:
    """The highest resident memory of this process (Linux); on a GPU the most that torch has allocated there."""
    return int(torch.cuda.max_memory_allocated()) if CUDA else _status("VmHWM")


def _status(key: str) -> int:
    # Not resource's ru_maxrss: a child begins with the peak of the process that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


class Meter:
    """Seconds, on a CPU per thread, and peak bytes above the start."""

    def start(self) -> None:
        """Resets the peak, after freed memory has gone back to the system: a peak could hide in it."""
        gc.collect()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            self._held = int(torch.cuda.memory_allocated())
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._held = _status("VmRSS")
        self._began = now()

    def stop(self) -> tuple[float, int]:
        """(seconds, bytes)."""
        seconds = (now() - self._began) / (1 if CUDA else torch.get_num_threads())
        return seconds, peak_bytes() - self._held


def in_child(script: str, *arguments: str, timeout: float | None = None, **environment: str) -> dict[str, Any]:
    """The JSON that a program prints last, in a process of its own; RuntimeError with its errors where it fails."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:].strip() or f"exit status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def machine() -> str:
    """The GPU; else the CPU's model, cores and system."""
    if CUDA:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {os.cpu_count()} cores, {platform.system()}"


def about(*packages: str) -> dict[str, Any]:
    """What stands beside all results: command, machine, threads, and versions (None where a package is absent)."""
    words = [Path(word).name if word.endswith((".json", ".gguf")) else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": machine(),
        "versions": {package: _version(package) for package in packages},
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(name: str, result: dict[str, Any]) -> None:
    """One results file."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def pyplot() -> Any:
    """matplotlib.pyplot for files; None, said in a line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
