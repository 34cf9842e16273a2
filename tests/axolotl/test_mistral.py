"""`tokenizer_use_mistral_common: true`: Axolotl's own wrapper of mistral-common's tokenizers, through a whole run."""

from pathlib import Path
from typing import Any

import pytest

from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.errors import ConfigError
from orpo_plugins.integrations import cli_chat as chat
from orpo_plugins.options import PairOptions
from tests.kit import mistral
from tests.kit.axolotl_runs import axolotl, dataset, logged, needs_axolotl, write_config, write_rows

needs_axolotl()
pytestmark = pytest.mark.filterwarnings("default:You are importing from 'trl.experimental'")

STRINGS = {"prompt": "where is my parcel", "chosen": "it will reach you", "rejected": "no idea"}


@pytest.mark.parametrize("name", ["tekken", "v3"])
def test_a_run_trains_evaluates_saves_and_is_talked_to(name: str, tmp_path: Path) -> None:
    from datasets import load_from_disk

    mistral.saved(tmp_path / "model", name)
    rows = [mistral.ROW, mistral.DIALOGUE]
    config = write_config(
        tmp_path / "config.yml",
        tokenizer_use_mistral_common=True,
        datasets=[
            dataset(write_rows(tmp_path / "rows.jsonl", rows)),
            dataset(write_rows(tmp_path / "calls.jsonl", [mistral.CALLS])),
            dataset(write_rows(tmp_path / "joined.jsonl", [mistral.STRINGS])),
            dataset(write_rows(tmp_path / "strings.jsonl", [STRINGS]), type="chat_template"),
        ],
        test_datasets=[dataset(write_rows(tmp_path / "test.jsonl", rows))],
        eval_steps=1,
        max_steps=1,
    )
    log = axolotl("train", config)
    assert "strings.jsonl: 1 rows of strings are written with the chat template" in log
    caches = [load_from_disk(str(path)) for path in (tmp_path / "prepared").glob("orpo-*")]
    found = max(caches, key=len)
    made = mistral.tokenizer(name)
    expected, _ = prepare_dataset([*rows, mistral.CALLS, mistral.STRINGS], made, PairOptions(max_length=None))
    strings, _ = prepare_dataset([STRINGS], made, PairOptions(template_strings=True))
    for column in ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"):
        assert sorted(found[column]) == sorted([*expected[column], *strings[column]])
    assert any("eval_loss" in entry for entry in logged(tmp_path / "out"))
    _, loaded = chat.load(str(tmp_path / "out"), device="cpu")
    assert type(loaded) is type(made)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": "chatml"}, "chat_template: chatml writes text with special tokens, .* Leave chat_template"),
        ({"type": "chat_template.argilla"}, "type: chat_template.argilla writes text with special .* Leave type out"),
    ],
)
def test_keys_that_write_text_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.mistral import HFMistralTokenizer

    from orpo_plugins.integrations import axolotl_data

    model = mistral.saved(tmp_path / "model", "tekken")
    given = dataset(write_rows(tmp_path / "rows.jsonl", [mistral.ROW]))
    cfg = DictDefault({"base_model": model, "sequence_len": 512, "datasets": [{**given, **keys}, given]})
    tokenizer = HFMistralTokenizer.from_pretrained(model)
    with pytest.raises(ConfigError, match=message):
        axolotl_data.tokenized(cfg.datasets[0], cfg, tokenizer, columns={}, index=0)
    pairs = axolotl_data.tokenized(cfg.datasets[1], cfg, tokenizer, columns={}, index=1)
    assert pairs[0]["chosen_labels"] == mistral.prepared(mistral.ROW, mistral.tokenizer())["chosen_labels"]
