"""Two CPU processes, started by `accelerate launch` and by `orpo-plugins trl`, do what one process does."""

import json
import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.kit import ROOT, tiny
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.launching import run_python

pytest.importorskip("trl")
from accelerate.commands.launch import launch_command_parser

from orpo_plugins.integrations.cli import starts_too_few
from orpo_plugins.integrations.trl_script import main

COMMAND = "import sys; from orpo_plugins.integrations.cli import main; sys.exit(main())"
PAIRS, STEPS = 4, 4


def launched(folder: Path, *words: str, ranks: int) -> Path:
    """The output folder of a training program started with `words`; the step has four pairs on so many ranks."""
    options = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data")]
    options += ["--max_steps", str(STEPS), "--per_device_train_batch_size", str(PAIRS // ranks)]
    options += ["--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--optim", "sgd", "--max_grad_norm", "0"]
    options += ["--logging_steps", "1", "--report_to", "none", "--use_cpu", "True", "--dtype", "float32"]
    output = folder / f"out-{ranks}-{len(words)}"
    options += ["--output_dir", str(output), "--disable_tqdm", "True", "--dataloader_pin_memory", "False"]
    if not words:
        main(["orpo", *options])
        return output
    run_python([*words, *options], folder)
    return output


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a dataset whose rows differ ten to one in length."""
    made = tmp_path_factory.mktemp("two")
    tiny.saved(made / "model", initializer_range=0.2)
    (made / "data").mkdir()
    (made / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, tiny.skewed_rows(PAIRS * STEPS))))
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return launched(folder, ranks=1)


def check(output: Path, whole: Path) -> None:
    """One saved model and one log, equal to those of one process."""
    runs = []
    for run in (output, whole):
        assert sorted(path.name for path in run.glob("*.safetensors")) == ["model.safetensors"]
        state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        runs.append([entry for entry in state["log_history"] if "loss" in entry])
    for found, expected in zip(*runs, strict=True):
        for key in ("loss", "nll_loss", "log_odds_ratio", "rewards/margins"):
            assert_within(found[key], expected[key], 1e-5, f"{key} at step {expected['step']}")
    assert_all_within(load_file(output / "model.safetensors"), load_file(whole / "model.safetensors"), 1e-5)


def test_accelerate_launch_of_the_example_script(folder: Path, whole: Path) -> None:
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", free_port()]
    script = str(ROOT / "examples" / "tutorials" / "trl_script.py")
    words = ["-m", "accelerate.commands.launch", *launcher, "--mixed_precision", "no", "--dynamo_backend", "no", script]
    check(launched(folder, *words, ranks=2), whole)


def test_our_command_starts_as_many_processes_as_it_is_told(folder: Path, whole: Path) -> None:
    launcher = ["--num_processes", "2", "--main_process_port", free_port()]
    check(launched(folder, "-c", COMMAND, "trl", "orpo", *launcher, ranks=2), whole)


@pytest.mark.parametrize(
    ("words", "few"),
    [
        ("--num_processes 2", True),
        ("--num_processes 2 --cpu", True),
        ("--num_processes 1 --cpu", False),
        ("--cpu", False),
        ("--num_processes 2 --multi_gpu", False),
        ("--num_processes 2 --use_fsdp", False),
    ],
)
def test_accelerate_starts_too_few_processes_on_a_cpu(words: str, few: bool) -> None:
    launch = launch_command_parser().parse_args([*words.split(), "script.py"])
    assert starts_too_few(launch, use_cpu=True) == few
