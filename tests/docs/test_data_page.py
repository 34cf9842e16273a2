"""docs/data.md: its examples run, and it names every format and option."""

import dataclasses
import re
from typing import Any

import pytest

from orpo_plugins.data.row_formats import orpo_row_formats
from orpo_plugins.options import PairOptions
from tests.kit import ROOT, tiny
from tests.kit.tokenizers import gpt2_tokenizer

TEXT = (ROOT / "docs" / "data.md").read_text()


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "the fox", "chosen": f" jumps {i}", "rejected": " sleeps"} for i in range(4)]
    tokenizer = gpt2_tokenizer()
    names: dict[str, Any] = {"rows": rows, "tokenizer": tokenizer, "model": tiny.model(vocab_size=len(tokenizer))}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out == "train: 4 of 4 rows kept\n"
    assert names["batch"]["input_ids"].shape[0] == 8
    assert names["tokenizer"].eos_token == "<|im_end|>"


def test_every_row_format_is_named() -> None:
    for row_format in orpo_row_formats():
        assert f"| {row_format.name} |" in TEXT


def test_every_length_is_named_with_its_default() -> None:
    lengths = [f for f in dataclasses.fields(PairOptions) if f.name.startswith(("max_", "truncation_"))]
    assert len(lengths) == 4
    for field in lengths:
        default = field.default if isinstance(field.default, int) else f"`{field.default}`"
        assert f"| `{field.name}` | {default} |" in TEXT
