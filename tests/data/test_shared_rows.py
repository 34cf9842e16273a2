"""Real preference data: every row goes through, or is reported.

The files are not part of the repository: ORPO_SHARED_DATA names their folder, by default ../shared/data.
"""

import json
from typing import Any

import pytest

from orpo_plugins import ORPOCollator
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.options import PairOptions
from tests.kit import SHARED_DATA
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer

pytestmark = pytest.mark.slow

SHAREGPT, ALPACA = "dpo_en_demo.json", "politeness.json"


def rows(name: str) -> list[dict[str, Any]]:
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"{name} is not in {SHARED_DATA}: set ORPO_SHARED_DATA to the folder that holds it")
    return list(json.loads((SHARED_DATA / name).read_text()))


@pytest.mark.parametrize("max_length", [None, 1024, 128])
def test_all_rows_in_sharegpt_format(max_length: int | None) -> None:
    data = rows(SHAREGPT)
    prepared, report = prepare_dataset(data, chatml_tokenizer(), PairOptions(max_length=max_length))
    assert (report.rows, len(data)) == (300, 300)
    # In a tiny vocabulary these texts are three times as long; answers that differ further on become equal.
    assert set(report.dropped) <= ({"chosen equals rejected after truncation"} if max_length == 128 else set())
    assert len(prepared) == report.kept == 300 - sum(map(len, report.dropped.values()))
    assert_well_formed(prepared, max_length, chatml_tokenizer())


@pytest.mark.parametrize("tokenizer", [chatml_tokenizer(), gpt2_tokenizer()], ids=["chat template", "no template"])
def test_all_rows_in_alpaca_format(tokenizer: Any) -> None:
    data = rows(ALPACA)
    prepared, report = prepare_dataset(data, tokenizer)
    equal = [index for index, row in enumerate(data) if row["chosen"] == row["rejected"]]
    assert (report.rows, report.kept) == (1100, 1094)
    assert report.dropped == {"chosen equals rejected": equal}
    assert report.repaired == []
    assert_well_formed(prepared, 1024, tokenizer)


@pytest.mark.parametrize("name", [SHAREGPT, ALPACA])
def test_raw_rows_go_through_the_collator(name: str) -> None:
    collator, data = ORPOCollator(chatml_tokenizer(), max_length=256), rows(name)
    usable = sum(collator(data[start : start + 10])["shift_labels"].shape[0] for start in range(0, len(data), 10)) // 2
    assert usable == len(data) - sum(collator.left_out.values())


def assert_well_formed(prepared: Any, max_length: int | None, tokenizer: Any) -> None:
    for row in prepared:
        for name in ("chosen", "rejected"):
            ids, labels = row[f"{name}_input_ids"], row[f"{name}_labels"]
            assert len(ids) == len(labels) <= (max_length or 10**9)
            assert ids[0] == tokenizer.bos_token_id
            start = next(i for i, label in enumerate(labels) if label != -100)
            assert start > 1
            assert labels == [-100] * start + ids[start:]
            assert len(ids) == max_length or ids[-1] == tokenizer.eos_token_id
        assert row["chosen_input_ids"] != row["rejected_input_ids"]
