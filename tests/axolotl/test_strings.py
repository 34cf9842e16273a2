"""Rows of strings under Axolotl: written with the chat template where the config says so, and said in the log."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.options import PairOptions
from tests.kit import tiny
from tests.kit.axolotl_runs import axolotl, dataset, folder_with_model, needs_axolotl, write_config, write_rows

needs_axolotl()
# Axolotl imports it.
pytestmark = pytest.mark.filterwarnings("default:You are importing from 'trl.experimental'")

SYSTEM = {"system": "please"}
ROWS = [{"prompt": "order today", "chosen": "gladly", "rejected": "never"}]
MESSAGES = [
    {
        name: [{"role": "user", "content": "order today"}, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "gladly"), ("rejected", "never"))
    }
]
# Types that `rl: dpo` has and `rl: orpo` has not, with rows as each of them reads them.
FOREIGN: dict[str, list[dict[str, Any]]] = {
    "llama3.default": ROWS,
    "llama3.intel": [{"question": "order today", "chosen": "gladly", "rejected": "never", **SYSTEM}],
    "llama3.icr": [{"input": "order today", "chosen": "gladly", "rejected": "never"}],
    "llama3.argilla_chat": MESSAGES,
    "chatml.intel": [{"question": "order today", "chosen": "gladly", "rejected": "never", **SYSTEM}],
    "chatml.prompt_pairs": ROWS,
    "chatml.default": [{"question": "order today", "chosen_response": "gladly", "rejected_response": "never"}],
    "chatml.argilla_chat": MESSAGES,
    "chatml.ultra": [{"prompt": "order today", **MESSAGES[0]}],
}


def tokenized(folder: Path, rows: list[dict[str, Any]], entry: dict[str, Any], **keys: Any) -> Any:
    """One dataset, as `axolotl preprocess` tokenizes it, with a tiny model's tokenizer."""
    from axolotl.utils.dict import DictDefault

    from orpo_plugins.integrations import axolotl_data

    if not (folder / "model").is_dir():
        folder_with_model(folder)
    given = dataset(write_rows(folder / "rows.jsonl", rows), **entry)
    cfg = DictDefault({"base_model": str(folder / "model"), "sequence_len": 512, "datasets": [given], **keys})
    columns = axolotl_data._columns(given)
    return axolotl_data.tokenized(cfg.datasets[0], cfg, tiny.tokenizer(), columns=columns, index=0)


def text(pairs: Any) -> str:
    return str(tiny.tokenizer().decode(pairs[0]["chosen_input_ids"]))


@pytest.mark.parametrize("type", FOREIGN)
def test_the_advice_for_a_type_of_another_method_gives_the_text_that_this_type_gives(type: str, tmp_path: Path) -> None:
    from axolotl.prompt_strategies.dpo import load
    from axolotl.utils.dict import DictDefault

    rows = FOREIGN[type]
    with pytest.raises(ConfigError) as error:
        tokenized(tmp_path, rows, {"type": type})
    found = re.search(rf"Axolotl has no type '{type}' for rl: orpo. Set (.*) in its place: rows are", str(error.value))
    assert found
    entry = yaml.safe_load(found[1].replace(", ", "\n"))
    theirs = load(type, DictDefault({"datasets": [{}]}))(dict(rows[0]))
    ours = text(tokenized(tmp_path, rows, entry))
    assert (theirs["prompt"] + theirs["chosen"]).removeprefix("<|begin_of_text|>") in ours
    assert ours.count("order today") == 1


@pytest.mark.parametrize("type", ["chat_template", "chat_template.default", "orpo.chat_template"])
def test_the_type_that_dpo_has_for_it_writes_strings_with_the_chat_template(
    type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pairs = tokenized(tmp_path, ROWS, {"type": type})
    expected, _ = prepare_dataset(ROWS, tiny.tokenizer(), PairOptions(template_strings=True))
    assert pairs.to_list() == expected.to_list()
    assert "rows.jsonl: 1 rows of strings are written with the chat template" in caplog.text


def test_strings_that_are_joined_although_a_template_is_set_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        joined = tokenized(tmp_path, ROWS, {"chat_template": "chatml"})
    assert text(joined) == "<s>order todaygladly</s>"
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert warning.getMessage().endswith(
        "rows.jsonl: 1 rows of strings are joined as they are, without chat_template: chatml. Set "
        "orpo_template_strings: true (or type: chat_template in this dataset) to write them with it"
    )
    for keys, entry in (({"orpo_template_strings": True}, {}), ({}, {"type": "chat_template"})):
        templated = tokenized(tmp_path, ROWS, {"chat_template": "chatml", **entry}, **keys)
        assert "<|im_start|>user\norder today<|im_end|>\n<|im_start|>assistant\ngladly<|im_end|>" in text(templated)


def test_what_is_templated_already_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "<|user|>order</s><|assistant|>", "chosen": "gladly</s>", "rejected": "never</s>"}]
    for some in (rows, MESSAGES):
        with caplog.at_level(logging.INFO):
            tokenized(tmp_path, some, {"chat_template": "chatml"})
        assert "joined as they are" not in caplog.text


def test_an_implicit_prompt_is_refused_in_words_of_the_config(tmp_path: Path) -> None:
    rows = [{"chosen": "order today: gladly", "rejected": "order today: never"}]
    with pytest.raises(RowError, match="row 0: "):
        tokenized(tmp_path, rows, {"type": "chat_template"})


def test_the_command_writes_strings_with_the_template_and_says_so(tmp_path: Path) -> None:
    from datasets import load_from_disk

    folder = folder_with_model(tmp_path)
    rows = dataset(write_rows(folder / "rows.jsonl", tiny.rows(4)))
    more = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in tiny.rows(3)]
    others = dataset(write_rows(folder / "others.jsonl", more), type="chat_template", field_prompt="question")
    settings = {"datasets": [rows, others], "val_set_size": 0, "chat_template": "chatml"}
    log = axolotl("preprocess", write_config(folder / "config.yml", **settings))
    assert re.search(r"WARNING.*rows.jsonl: 4 rows of strings are joined as they are, without chat_template", log)
    assert "others.jsonl: 3 rows of strings are written with the chat template" in log
    log = axolotl("preprocess", write_config(folder / "config.yml", **settings, orpo_template_strings=True))
    assert "rows.jsonl: 4 rows of strings are written with the chat template" in log
    caches = [load_from_disk(path) for path in (folder / "prepared").glob("orpo-*")]
    assert sorted(
        sum("<|im_start|>" in tiny.tokenizer().decode(ids) for ids in cache["chosen_input_ids"]) for cache in caches
    ) == [3, 7]
