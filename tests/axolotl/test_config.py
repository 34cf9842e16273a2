"""Configs that the plugin refuses, comments on, or stays out of; read by Axolotl's own loader in one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit import ROOT
from tests.kit.axolotl_runs import (
    axolotl,
    dataset,
    folder_with_model,
    needs_axolotl,
    write_config,
    write_rows,
)
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.launching import environment

needs_axolotl()

READ_ALL = """
import json, sys
from axolotl.cli.config import load_cfg

for path in sys.argv[1:]:
    print("=== " + path, flush=True)
    try:
        cfg = load_cfg(path)
        said = {key: value for key, value in cfg.items() if key.startswith("orpo_") or key in ("rl", "trainer_cls")}
        print(json.dumps({"path": path, "cfg": said}, default=str))
    except Exception as error:
        print(json.dumps({"path": path, "error": f"{type(error).__name__}: {error}"}))
"""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mistyped key": (
        {"orpo_kernal": "chunked"},
        "ConfigError: unknown YAML key 'orpo_kernal' (did you mean orpo_kernel?); known: orpo_alpha, orpo_kernel,",
    ),
    "an unknown kernel": (
        {"orpo_kernel": "fast"},
        "unknown kernel 'fast'; known: auto, chunked, chunked_fp32, reference",
    ),
    "an unknown layout": ({"orpo_layout": "flat"}, "unknown layout 'flat'; known: auto, packed, padded"),
    "an unknown nll_over": ({"orpo_nll_over": "answer"}, "unknown orpo_nll_over 'answer'; known: sequence, completion"),
    "an unknown normalization": (
        {"orpo_nll_normalization": "token"},
        "unknown orpo_nll_normalization 'token'; known: batch, microbatch, pair",
    ),
    "an unknown loss term": ({"orpo_loss_terms": {"simpo": 1.0}}, "unknown loss term 'simpo'; known:"),
    "an unknown truncation": (
        {"orpo_truncation_mode": "middle"},
        "unknown orpo_truncation_mode 'middle'; known: keep_end",
    ),
    "a temperature of zero": ({"orpo_odds_temperature": 0}, "odds_temperature is 0.0: it must be a finite number > 0"),
    "a negative beta": (
        {"orpo_alpha": -1},
        "beta is -1.0: it weighs the odds-ratio term and must be a finite number >= 0",
    ),
    "a beta in words": ({"orpo_alpha": "much"}, "orpo_alpha is 'much': it must be a number"),
    "betas that disagree": (
        {"orpo_alpha": 0.1, "rl_beta": 0.2},
        "rl_beta: 0.2, orpo_alpha: 0.1 are one option, the weight of the odds-ratio term: keep orpo_alpha alone",
    ),
    "another trainer": (
        {"trainer_cls": "my.Trainer"},
        "trainer_cls is 'my.Trainer', but orpo-plugins brings the trainer for rl: orpo: remove trainer_cls, or remove",
    ),
    "sample packing": (
        {"sample_packing": True},
        "sample_packing does not apply to pairs: remove it; orpo_layout: packed",
    ),
    "batches filled up to no limit": (
        {"orpo_step_strategy": "tokens"},
        "orpo_step_strategy: tokens fills batches up to orpo_max_tokens_per_batch: set that too",
    ),
    "an unknown step strategy": (
        {"orpo_max_tokens_per_batch": 900, "orpo_step_strategy": "rows"},
        "unknown orpo_step_strategy 'rows'; known: pairs, tokens",
    ),
}

ACCEPTED: dict[str, dict[str, Any]] = {
    "settings without effect": {"chunked_cross_entropy": True, "pad_to_sequence_len": True},
    "beta by its other name": {"rl_beta": 0.2, "orpo_kernel": "chunked"},
    "another method": {"rl": "dpo", "orpo_kernel": "chunked"},
}


EXAMPLES = sorted((ROOT / "examples").glob("axolotl/*.yml"))


def example(path: Path) -> dict[str, Any]:
    """The settings of an example config, without what is not on this machine."""
    settings: dict[str, Any] = yaml.safe_load(path.read_text())
    for key in ("base_model", "output_dir"):
        settings.pop(key, None)
    return {**settings, "bf16": False}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """What the loader returned or raised, and what it logged, by the names above."""
    folder = folder_with_model(tmp_path_factory.mktemp("configs"))
    rows = [dataset(write_rows(folder / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]))]
    cases = {
        **{name: settings for name, (settings, _) in REFUSED.items()},
        **ACCEPTED,
        **{path.name: example(path) for path in EXAMPLES},
    }
    paths = {
        str(write_config(folder / f"{number}.yml", **{"datasets": rows, "val_set_size": 0, **settings})): name
        for number, (name, settings) in enumerate(cases.items())
    }
    run = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"path"')]
    assert len(results) == len(paths), run.stdout[-6000:]
    logs = {paths[part.split("\n")[0]]: part for part in run.stdout.split("=== ")[1:]}
    return {paths[result["path"]]: result for result in results}, logs


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_clear_message(name: str, read: tuple[dict[str, Any], dict[str, str]]) -> None:
    assert REFUSED[name][1] in read[0][name].get("error", f"no error: {read[0][name]}")


def test_settings_without_effect_are_named(read: tuple[dict[str, Any], dict[str, str]]) -> None:
    log = read[1]["settings without effect"]
    reason = "orpo-plugins computes the head, see orpo_kernel"
    assert f"chunked_cross_entropy: True has no effect under rl: orpo: {reason}" in log
    assert "pad_to_sequence_len: True has no effect under rl: orpo: batches are padded by the layout" in log


def test_keys_reach_the_validated_config_with_our_trainer(read: tuple[dict[str, Any], dict[str, str]]) -> None:
    assert read[0]["beta by its other name"]["cfg"] == {
        "rl": "orpo",
        "orpo_kernel": "chunked",
        "trainer_cls": "orpo_plugins.integrations.axolotl_trainer.AxolotlORPOTrainer",
    }


def test_another_method_is_left_alone_and_told_so(read: tuple[dict[str, Any], dict[str, str]]) -> None:
    assert "trainer_cls" not in read[0]["another method"]["cfg"]
    assert "orpo-plugins does nothing: rl is 'dpo', not 'orpo'" in read[1]["another method"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_configs_are_accepted(path: Path, read: tuple[dict[str, Any], dict[str, str]]) -> None:
    assert read[0][path.name].get("error") is None
    assert read[0][path.name]["cfg"]["orpo_alpha"] == 0.1


def test_the_command_itself_fails_on_a_mistyped_key(tmp_path: Path) -> None:
    rows = [dataset(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]))]
    config = write_config(tmp_path / "config.yml", datasets=rows, val_set_size=0, orpo_kernal="chunked")
    assert "unknown YAML key 'orpo_kernal' (did you mean orpo_kernel?)" in axolotl("train", config, succeeds=False)


def test_rows_that_are_too_long_are_dropped_or_refused_as_the_strategy_says(caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset

    from orpo_plugins.errors import RowError
    from orpo_plugins.integrations.axolotl_data import drop_too_long

    pairs = Dataset.from_dict({"chosen_input_ids": [[1] * 5, [1] * 9], "rejected_input_ids": [[1] * 2, [1] * 2]})
    assert drop_too_long(pairs, 9, "drop", "rows").to_list() == pairs.to_list()
    with caplog.at_level("WARNING"):
        assert drop_too_long(pairs, 8, "drop", "rows").to_list() == pairs.select([0]).to_list()
    assert "rows: dropped 1 of 2 pairs as longer than sequence_len 8 (the longest has 9 tokens)" in caplog.text
    with pytest.raises(RowError, match="rows: 1 pairs are longer than sequence_len 8 .* set excess_length_strategy to"):
        drop_too_long(pairs, 8, "raise", "rows")


def test_an_encoder_decoder_model_must_not_be_loaded_as_a_causal_one(tmp_path: Path) -> None:
    from axolotl.utils.dict import DictDefault

    from orpo_plugins.errors import ConfigError
    from orpo_plugins.integrations.axolotl_data import has_encoder

    encoder_decoder("bart").config.save_pretrained(tmp_path)
    given = {"base_model": str(tmp_path)}
    assert has_encoder(DictDefault(given | {"type_of_model": "AutoModelForSeq2SeqLM"}))
    with pytest.raises(ConfigError, match="is an encoder-decoder model .* set type_of_model: AutoModelForSeq2SeqLM"):
        has_encoder(DictDefault(given | {"type_of_model": "AutoModelForCausalLM"}))
