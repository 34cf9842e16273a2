"""Runs `axolotl train` on the demo's config and shows a few lines of its log, one per ten steps.

python examples/demo/train.py          # after examples/demo/prepare.py

The whole log is written to build/demo/train.log.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

FOLDER = Path("build/demo")
FIGURES = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "log-probability helpful",
    "logps/rejected": "brush-off",
}
LOGGER_LINE = re.compile(r"\[\S+ \S+\] \[\w+\] \[(?P<logger>\S+)\] (?P<message>.*)")
PROGRESS = re.compile(r"(\d+)/(\d+) \[")
ONE_PAIR = ("  prompt (", "  chosen (", "  rejected (")


def main() -> int:
    """Returns the exit status of Axolotl; after a failure the end of its log is shown."""
    command = ["axolotl", "train", str(FOLDER / "config.yml"), "--launcher", "python"]
    print(f"{' '.join(command)}\n  (its whole log: {FOLDER / 'train.log'}; it begins in some seconds)", flush=True)
    command[0] = str(Path(sys.executable).with_name(command[0]))
    # In text mode the carriage returns of progress bars end lines as well.
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert run.stdout is not None
    with (FOLDER / "train.log").open("w", encoding="utf-8") as log:
        for line in shown(kept(run.stdout, log)):
            print(line, flush=True)
    if run.wait() != 0:
        print("\n".join((FOLDER / "train.log").read_text(encoding="utf-8").splitlines()[-40:]), file=sys.stderr)
    return run.returncode


def kept(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    """The lines without their ends, each written to `log` first."""
    for line in lines:
        log.write(line)
        yield line.rstrip()


def shown(lines: Iterable[str]) -> Iterator[str]:
    """What is worth reading: messages of orpo-plugins, one pair as it is trained, and the figures of a step."""
    step = total = 0
    training = False
    for line in lines:
        training |= "Starting trainer" in line
        if training and (found := PROGRESS.search(line)) and int(found[2]) >= total:
            step, total = int(found[1]), int(found[2])  # a bar of an evaluation is shorter
        if line.startswith("{'loss'"):
            yield f"  step {step:>3} of {total}: {figures(line, '')}"
        elif line.startswith("{'eval_loss'"):
            yield f"       held-out: {figures(line, 'eval_')}"
        elif line.startswith(ONE_PAIR):
            yield cut(line)
        elif (found := LOGGER_LINE.search(line)) and "orpo_plugins" in found["logger"]:
            yield cut(f"  {found['message']}")


def figures(line: str, prefix: str) -> str:
    """The chosen figures of one entry of the Trainer's log."""
    entry = ast.literal_eval(line)
    return ", ".join(f"{name} {float(entry[prefix + key]):.3f}" for key, name in FIGURES.items())


def cut(line: str, width: int = 150) -> str:
    """A line of at most `width` characters."""
    return line if len(line) <= width else line[: width - 4] + " ..."


if __name__ == "__main__":
    sys.exit(main())
