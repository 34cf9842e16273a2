"""`orpo-plugins trl`: TRL's command line for ORPO."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orpo_plugins import errors
from tests.kit import tiny
from tests.kit.launching import environment

pytest.importorskip("trl")
from orpo_plugins.integrations import cli as command_line
from orpo_plugins.integrations.trl_script import datasets_of, main, make_parser, translate_flags

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from orpo_plugins.integrations.cli import main; sys.exit(main())",
]
QUIET = ["--use_cpu", "True", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and datasets in several forms."""
    folder = tmp_path_factory.mktemp("base")
    tiny.saved(folder / "model")
    (folder / "rows.json").write_text(json.dumps(tiny.rows(12)))
    (folder / "data").mkdir()
    for name, count in (("train", 8), ("test", 4)):
        lines = "\n".join(json.dumps(row) for row in tiny.rows(count))
        (folder / "data" / f"{name}.jsonl").write_text(lines)
    return folder


def flags(base: Path, dataset: str = "rows.json", **options: Any) -> list[str]:
    """Command-line flags for two short steps; what this gives for `options` comes last."""
    common = ["--model_name_or_path", str(base / "model"), "--dataset_name", str(base / dataset), "--dtype", "float32"]
    steps = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--max_length", "128"]
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [*common, *steps, *QUIET, *given]


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(), cwd=cwd, capture_output=True, text=True, timeout=300
    )


# ---- the whole command, in processes of its own


def test_the_command_trains_and_saves(base: Path, tmp_path: Path) -> None:
    done = run(["trl", *flags(base, output_dir=tmp_path / "out", num_processes=1)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ORPO by orpo-plugins is active" in done.stderr
    assert "Model saved to" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_options_come_from_a_yaml_file_and_flags_override_it(base: Path, tmp_path: Path) -> None:
    import yaml

    options = {
        "model_name_or_path": str(base / "model"),
        "dataset_name": str(base / "data"),
        "output_dir": str(tmp_path / "out"),
        "evaluation_strategy": "steps",  # the old name
        "eval_steps": 1,
        "orpo_alpha": 0.5,
        "dtype": "float32",
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "use_cpu": True,
        "report_to": "none",
        "num_processes": 1,  # for accelerate launch
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    done = run(["trl", "orpo", "--config", "config.yaml", "--max_steps", "2", "--warmup_ratio=0.5"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "evaluation_strategy is now eval_strategy" in done.stderr
    assert "beta=0.5" in done.stderr
    assert done.stdout.count("eval_rewards/accuracies") == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_failing_run_ends_with_one_line_and_a_status(base: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([{"question": "a", "answer": "b"}]))
    done = run(["trl", *flags(base, output_dir="out", dataset_name=tmp_path / "bad.json")], tmp_path)
    assert done.returncode != 0
    assert "orpo-plugins: error: row 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_commands_own_help_imports_no_framework() -> None:
    program = (
        "import sys; from orpo_plugins.integrations.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'trl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")
    assert "orpo-plugins trl orpo" in done.stdout


# ---- in this process


def test_info_lists_versions_and_what_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "transformers",
        "chunked",
        "padded",
        "sharegpt",
        "kernels for bf16 on",
        "orpo-layout-padded (built in)",
    ):
        assert word in shown, word


@pytest.mark.parametrize("arguments", [["trl", "--help"], ["trl", "orpo", "-h"]])
def test_help_lists_every_option(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command_line.main(arguments)
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--dataset_name", "--nll_normalization", "--lora_r", "--load_in_4bit"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo"], "unknown method 'dpo'; known: orpo"),
        (["--beta", "-1"], "beta is -1"),
        (["--max_lenght", "3"], "--max_lenght is an option of neither .* did you mean --max_length?"),
        (["--kernel", "quick"], "unknown kernel 'quick'"),
        (["--label_pad_token_id", "0"], "label_pad_token_id=0 is not supported"),
        (["--evaluation_strategy", "steps", "--eval_strategy", "no"], "are the same option: pass eval_strategy alone"),
    ],
)
def test_a_bad_command_is_one_line_before_anything_is_launched(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    assert command_line.main(["trl", *arguments]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert shown.startswith("orpo-plugins: error: ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--evaluation_strategy", "steps"], ["--eval_strategy", "steps"]),
        (["--evaluation-strategy=steps"], ["--eval_strategy", "steps"]),
        (["--orpo_alpha", "0.5", "--beta2", "1"], ["--beta2", "1", "--beta", "0.5"]),
        (["--no_cuda"], ["--use_cpu", "True"]),
        (["--warmup_ratio", "0.1"], ["--warmup_steps", "0.1"]),
        (["--group_by_length", "True"], ["--train_sampling_strategy", "group_by_length"]),
        (["--overwrite_output_dir", "--bf16", "False"], ["--bf16", "False"]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_flags_become_those_of_today(old: list[str], new: list[str]) -> None:
    assert translate_flags(old, frozenset({"eval_strategy", "beta", "use_cpu", "bf16"})) == new


def test_flags_without_an_old_name_stay_in_order() -> None:
    arguments = ["--b", "1", "2", "--a", "-1", "--c=x"]
    assert translate_flags(arguments, frozenset({"a", "b", "c"})) == arguments


def loaded(arguments: list[str], evaluates: bool = True) -> tuple[Any, Any]:
    script, _, _, mixture = make_parser().parse_args_and_config(arguments)
    return datasets_of(script, mixture, evaluates)


def test_datasets_are_files_folders_or_saved_ones(base: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    folder = ["--output_dir", str(tmp_path)]
    train, test = loaded(["--dataset_name", str(base / "data"), *folder])
    assert (len(train), len(test)) == (8, 4)
    slices = ["--dataset_train_split", "train[:9]", "--dataset_test_split", "train[9:]"]
    train, test = loaded(["--dataset_name", str(base / "rows.json"), *slices, *folder])
    assert (len(train), len(test)) == (9, 3)
    train, test = loaded(["--dataset_name", str(base / "rows.json"), *folder], evaluates=False)
    assert (len(train), test) == (12, None)
    DatasetDict(train=Dataset.from_list(tiny.rows(3)), test=Dataset.from_list(tiny.rows(2))).save_to_disk(
        tmp_path / "d"
    )
    train, test = loaded(["--dataset_name", str(tmp_path / "d"), *folder])
    assert (len(train), len(test)) == (3, 2)
    streamed, _ = loaded(["--dataset_name", str(base / "data"), "--dataset_streaming", *folder], evaluates=False)
    assert next(iter(streamed))["prompt"] == tiny.rows(8)[0]["prompt"]


def test_a_missing_split_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"has no split 'test'.*train\[:90%\]"):
        loaded(["--dataset_name", str(base / "rows.json"), "--output_dir", str(tmp_path)])
    with pytest.raises(errors.ConfigError, match="no dataset: pass --dataset_name"):
        loaded(["--output_dir", str(tmp_path)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # bitsandbytes looks for CPU kernels on the hub
def test_quantization_flags_reach_the_model(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = {"load_in_4bit": True, "use_peft": True, "lora_dropout": 0.05, "lora_task_type": "CAUSAL_LM"}
    main(["orpo", *flags(base, output_dir=tmp_path, **quantized), "--lora_target_modules", "q_proj", "v_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["lora_dropout"], sorted(config["target_modules"])) == (0.05, ["q_proj", "v_proj"])
