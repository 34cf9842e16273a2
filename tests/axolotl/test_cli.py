"""Axolotl's own commands with `plugins: [orpo_plugins.ORPOPlugin]` and `rl: orpo`, each in a process of its own."""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orpo_plugins.data.dataset import prepare_dataset
from tests.kit import SHARED_DATA, tiny
from tests.kit.axolotl_runs import (
    LORA,
    argilla,
    axolotl,
    dataset,
    folder_with_model,
    logged,
    needs_axolotl,
    write_config,
    write_rows,
)
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.encoder_decoder import tokenizer as encoder_decoder_tokenizer

needs_axolotl()

METRICS = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "nll_loss", "log_odds_ratio")


def sharegpt(row: dict[str, str]) -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": row["prompt"]}],
        "chosen": {"from": "gpt", "value": row["chosen"]},
        "rejected": {"from": "gpt", "value": row["rejected"]},
    }


def renamed(row: dict[str, str]) -> dict[str, str]:
    return {"question": row["prompt"], "better": row["chosen"], "worse": row["rejected"]}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder in which LoRA was preprocessed and trained on four kinds of datasets, and the log of each command."""
    folder = folder_with_model(tmp_path_factory.mktemp("lora"))
    rows = tiny.rows(24)
    rows[0]["chosen"] += " order" * 300
    config = write_config(
        folder / "config.yml",
        datasets=[
            dataset(write_rows(folder / "strings.jsonl", rows[:6])),
            dataset(
                write_rows(folder / "sharegpt.jsonl", map(sharegpt, rows[6:12])), type="orpo", chat_template="chatml"
            ),
            dataset(write_rows(folder / "argilla.jsonl", map(argilla, rows[12:18])), type="chat_template.argilla"),
            dataset(
                write_rows(folder / "renamed.jsonl", map(renamed, rows[18:])),
                field_prompt="question",
                field_chosen="better",
                field_rejected="worse",
            ),
        ],
        excess_length_strategy="truncate",
        val_set_size=4,
        eval_steps=2,
        save_steps=2,
        pad_to_multiple_of=8,
        orpo_alpha=0.25,
        **LORA,
    )
    logs = {command: axolotl(command, config) for command in ("preprocess", "train")}
    return folder, logs


def test_preprocess_tokenizes_every_dataset_and_train_reads_the_cache(lora: tuple[Path, dict[str, str]]) -> None:
    folder, logs = lora
    for name in ("strings", "sharegpt", "argilla", "renamed"):
        assert f"{folder / name}.jsonl: 6 of 6 rows kept" in logs["preprocess"]
        assert f"{name}.jsonl: 6 of 6" not in logs["train"]
    assert "Loading prepared dataset from disk" in logs["train"]


def test_every_dataset_is_tokenized_as_its_rows_and_template_say(lora: tuple[Path, dict[str, str]]) -> None:
    from axolotl.utils.chat_templates import get_chat_template
    from datasets import load_from_disk

    cached = load_from_disk(next(iter((lora[0] / "prepared").glob("orpo-*"))))
    found = {(tuple(row["chosen_input_ids"]), tuple(row["rejected_input_ids"])) for row in cached}
    rows, tokenizer, chatml = tiny.rows(24), tiny.tokenizer(), tiny.tokenizer(get_chat_template("chatml"))

    def ids(some: Iterable[dict[str, Any]], with_tokenizer: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        pairs, _ = prepare_dataset(list(some), with_tokenizer)
        return {(tuple(row["chosen_input_ids"]), tuple(row["rejected_input_ids"])) for row in pairs}

    assert ids(rows[1:6] + rows[18:], tokenizer) < found
    assert ids(map(sharegpt, rows[6:12]), chatml) < found
    # Where all turns alternate, Axolotl's own type means what our row formats mean.
    assert ids(map(argilla, rows[12:18]), tokenizer) < found
    assert len(cached) == 24


def test_truncation_is_reported_where_it_is_asked_for(lora: tuple[Path, dict[str, str]]) -> None:
    assert "truncated: 0 prompts, 1 chosen answers, 0 rejected answers" in lora[1]["preprocess"]


def test_train_says_that_ours_is_active_with_kernel_and_layout(lora: tuple[Path, dict[str, str]]) -> None:
    log = lora[1]["train"]
    assert "takes over rl: orpo" in log
    assert re.search(r"ORPO by orpo-plugins is active: kernel=\w+, layout=\w+, .*beta=0.25", log)
    assert "pad_to_multiple_of has no effect" in log


def test_train_logs_and_evaluates_with_all_metrics(lora: tuple[Path, dict[str, str]]) -> None:
    history = logged(lora[0] / "out")
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2, 4]
    for key in METRICS:
        assert all(key in entry for entry in history if "loss" in entry)
        assert all(f"eval_{key}" in entry for entry in history if "eval_loss" in entry)


def test_lora_dropout_stays_and_the_base_stays_frozen(lora: tuple[Path, dict[str, str]]) -> None:
    folder, _ = lora
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["lora_dropout"] == 0.05
    adapter = load_file(folder / "out" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)


def test_resuming_ends_where_the_uninterrupted_run_ends(lora: tuple[Path, dict[str, str]]) -> None:
    folder, _ = lora
    settings = {"--resume-from-checkpoint": "out/checkpoint-2", "--output-dir": "resumed"}
    axolotl("train", folder / "config.yml", *(word for pair in settings.items() for word in pair))
    whole, resumed = (load_file(folder / name / "adapter_model.safetensors") for name in ("out", "resumed"))
    assert_all_within(resumed, whole, 1e-6)


def test_evaluate_gives_the_figures_of_the_last_evaluation_in_training(lora: tuple[Path, dict[str, str]]) -> None:
    folder, _ = lora
    log = axolotl("evaluate", folder / "config.yml", "--lora-model-dir", "out", "--output-dir", "evaluated")
    assert "Loading prepared dataset from disk" in log
    with (folder / "evaluated" / "eval_summary.csv").open() as file:
        found = {row["metric"]: float(row["validation"] or "nan") for row in csv.DictReader(file)}
    last = [entry for entry in logged(folder / "out") if "eval_loss" in entry][-1]
    for key in ("loss", *METRICS):
        assert_within(found[key], last[f"eval_{key}"], 1e-5, key)


def test_merge_lora_gives_a_model_that_computes_the_same(lora: tuple[Path, dict[str, str]]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = lora
    axolotl("merge-lora", folder / "config.yml", "--lora-model-dir", "out")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    with_adapter = PeftModel.from_pretrained(base, folder / "out").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "out" / "merged", dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert_within(merged(ids).logits, with_adapter(ids).logits, 1e-5)


def test_qlora_with_an_eight_bit_optimizer_drops_rows_that_are_too_long(tmp_path: Path) -> None:
    folder = folder_with_model(tmp_path, hidden_size=64, intermediate_size=128)
    rows = tiny.rows(12)
    rows[5]["rejected"] += " order" * 300
    config = write_config(
        folder / "config.yml",
        datasets=[dataset(write_rows(folder / "rows.jsonl", rows))],
        val_set_size=0,
        optimizer="adamw_8bit",
        load_in_4bit=True,
        save_steps=4,
        **{**LORA, "adapter": "qlora"},
    )
    log = axolotl("train", config)
    assert "ORPO by orpo-plugins is active" in log
    assert "rows.jsonl: dropped 1 of 12 pairs as longer than sequence_len 256" in log
    losses = [entry["loss"] for entry in logged(folder / "out") if "loss" in entry]
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("files", [("dpo_en_demo.json", "politeness.json")])
def test_real_rows_full_fine_tuning_with_every_key_set(tmp_path: Path, files: tuple[str, ...]) -> None:
    missing = [name for name in files if not (SHARED_DATA / name).is_file()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {SHARED_DATA}: set ORPO_SHARED_DATA to the folder that holds them")
    folder = folder_with_model(tmp_path, max_position_embeddings=8192)
    config = write_config(
        folder / "config.yml",
        datasets=[dataset(SHARED_DATA / name) for name in files],
        test_datasets=[dataset(write_rows(folder / "test.jsonl", tiny.conversations(4)))],
        eval_steps=2,
        max_steps=2,
        save_steps=2,
        sequence_len=8192,
        optimizer="muon",
        lr_scheduler="rex",
        warmup_steps=1,
        chat_template="chatml",
        train_on_inputs=True,
        orpo_kernel="reference",
        orpo_layout="padded",
        orpo_nll_over="completion",
        orpo_nll_normalization="pair",
        orpo_odds_temperature=2.0,
        orpo_max_prompt_length=256,
        orpo_max_completion_length=256,
        orpo_truncation_mode="keep_start",
        orpo_memory_budget=10**8,
    )
    log = axolotl("train", config)
    assert "dpo_en_demo.json: 300 of 300 rows kept" in log
    assert re.search(r"politeness.json: 1[01]\d\d of 1100 rows kept", log)
    assert "kernel=reference, layout=padded, nll_over=completion, nll_normalization=pair" in log
    assert "train_on_inputs: True has no effect under rl: orpo" in log
    assert [entry["step"] for entry in logged(folder / "out") if "eval_loss" in entry] == [0, 2]


def test_an_encoder_decoder_model_has_its_prompts_tokenized_by_themselves(tmp_path: Path) -> None:
    from datasets import load_from_disk

    from orpo_plugins.options import PairOptions

    encoder_decoder("t5").save_pretrained(tmp_path / "model")
    encoder_decoder_tokenizer().save_pretrained(tmp_path / "model")
    rows = tiny.rows(8)
    config = write_config(
        tmp_path / "config.yml",
        datasets=[dataset(write_rows(tmp_path / "rows.jsonl", rows))],
        type_of_model="AutoModelForSeq2SeqLM",
        max_steps=1,
    )
    log = axolotl("train", config)
    assert "layout=seq2seq" in log
    cached = load_from_disk(next(iter((tmp_path / "prepared").glob("orpo-*"))))
    pairs, _ = prepare_dataset(rows, encoder_decoder_tokenizer(), PairOptions(encoder_decoder=True))
    assert sorted(cached["chosen_input_ids"]) == sorted(pairs["chosen_input_ids"])
    assert len([entry for entry in logged(tmp_path / "out") if "loss" in entry]) == 1
