"""Under Axolotl errors name YAML keys, and what they advise works."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_plugins.data.pairs import PairBuilder
from orpo_plugins.errors import ConfigError, ORPOError, RowError
from tests.kit import ROOT, tiny
from tests.kit.axolotl_runs import axolotl, dataset, folder_with_model, needs_axolotl, write_config, write_rows

needs_axolotl()
pytestmark = pytest.mark.filterwarnings("default:You are importing from 'trl.experimental'")

ROWS = tiny.rows(3)
CONVERSATIONS = tiny.conversations(3)
# What only Python programs get to see: the command line's, a stock Trainer's, Axolotl's own.
NOT_AXOLOTLS = re.compile("axolotl|cli|chat_format|chat_id_pairs|hf_legacy|hf_stock|trl_|hf_tokenizer|presets")


def load(folder: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **settings: Any) -> Any:
    """The training set of a config with one dataset; keys of the dataset are those that are not the config's."""
    from axolotl.utils.dict import DictDefault

    from orpo_plugins.integrations import axolotl_data

    if not (folder / "model").is_dir():
        folder_with_model(folder)
    own = {key: settings.pop(key) for key in [*settings] if key.startswith("field_") or key in ("type", "split")}
    entry = {**dataset(write_rows(folder / "rows.jsonl", rows)), **own}
    made = tokenizer or tiny.tokenizer()
    if settings.get("chat_template") and made.chat_template is None:  # as Axolotl's load_tokenizer has it
        made.chat_template = tiny.CHAT_TEMPLATE
    raw = {"datasets": [entry], "sequence_len": 512, "orpo_columns": None, **settings}
    axolotl_data.keep_column_names(raw)
    paths = {"base_model": str(folder / "model"), "dataset_prepared_path": str(folder / "prepared")}
    cfg = DictDefault({**raw, **paths, "rl": "orpo", "skip_prepare_dataset": True})
    return axolotl_data.load(cfg, made)[0]


def renamed(row: dict[str, str]) -> dict[str, str]:
    return {"question": row["prompt"], "accepted": row["chosen"], "worse": row["rejected"]}


# rows, settings, the message and the keys in it that fix it
ADVICE: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str, str]] = {
    "columns under other names": (
        [renamed(row) for row in ROWS],
        {},
        "Set (field_prompt: question, field_chosen: accepted, field_rejected: worse) for this dataset.",
        "",
    ),
    "one column under another name": (
        [{"query": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS],
        {},
        "Set (field_prompt: query) for this dataset.",
        "",
    ),
    "a prompt in a column that nobody knows": (
        [{"trajectory": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS],
        {},
        "Set (field_prompt: trajectory) for this dataset.",
        "",
    ),
    "no rejected answer": ([{**ROWS[0], "rejected": None}], {}, r"\((orpo_sft_rows: true)\)", ""),
    "longer than sequence_len": (
        ROWS,
        {"sequence_len": 8, "excess_length_strategy": "raise"},
        "raise sequence_len, or set excess_length_strategy to truncate or drop",
        "excess_length_strategy: truncate",
    ),
    "a prompt as long as sequence_len": (
        ROWS,
        {"sequence_len": 64, "excess_length_strategy": "truncate", "orpo_max_prompt_length": 64},
        "orpo_max_prompt_length 64 leaves no room for an answer in sequence_len 64: lower it, or raise sequence_len",
        "sequence_len: 65",
    ),
    "an implicit prompt to template": (
        [{"chosen": "order: gladly", "rejected": "order: never"}],
        {"orpo_template_strings": True},
        "give the prompt a column of its own, or set (orpo_template_strings: false)",
        "",
    ),
    "a type for supervised training": (
        [renamed(row) for row in ROWS],
        {"type": {"field_instruction": "question"}},
        "leave `type` out and name the columns with field_prompt, field_chosen, field_rejected",
        "type: null, field_prompt: question, field_chosen: accepted, field_rejected: worse",
    ),
    "a field that is not there": (
        ROWS,
        {"field_prompt": "question"},
        "has no column 'question', which its field_. keys name; it has prompt, chosen, rejected",
        "field_prompt: prompt",
    ),
    "an unknown strategy": (
        ROWS,
        {"excess_length_strategy": "cut"},
        "unknown excess_length_strategy 'cut'; known: drop, truncate, raise",
        "excess_length_strategy: drop",
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_the_keys_that_an_error_names_fix_it(name: str, tmp_path: Path) -> None:
    rows, settings, message, keys = ADVICE[name]
    with pytest.raises(ORPOError) as error:
        load(tmp_path, rows, **settings)
    found = re.search(message, str(error.value))
    assert found, str(error.value)
    advice = yaml.safe_load((keys or found[1]).replace(", ", "\n"))
    assert len(load(tmp_path, rows, **{**settings, **advice})) == len(rows)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (CONVERSATIONS, {}, "the tokenizer has no chat template: set chat_template, to chatml for one"),
        (ROWS, {"orpo_template_strings": True}, "orpo_template_strings: true needs a chat template, but the tokenizer"),
    ],
)
def test_a_chat_template_is_a_key(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ORPOError, match=message):
        load(tmp_path, rows, tiny.tokenizer(None), **settings)
    assert len(load(tmp_path, rows, tiny.tokenizer(None), **settings, chat_template="chatml")) == len(rows)


def test_no_eos_token_is_a_key() -> None:
    from orpo_plugins.integrations.axolotl_wording import yaml_words

    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"set special_tokens: \{eos_token: \.\.\.\} to the token that"), yaml_words():
        PairBuilder(tokenizer)
    tokenizer.chat_template = None
    message = r"set special_tokens: \{eos_token: \.\.\.\} to a token of its vocabulary$"
    with pytest.raises(ConfigError, match=message), yaml_words():
        PairBuilder(tokenizer)


def test_outside_of_axolotl_errors_are_those_for_python(tmp_path: Path) -> None:
    from orpo_plugins.data.row_formats import parse_row

    with pytest.raises(RowError, match=r"Set field_prompt: question"):
        load(tmp_path, [renamed(ROWS[0])])
    with pytest.raises(RowError, match=r"Did you mean dataset.rename_column\('question', 'prompt'\)"):
        parse_row(renamed(ROWS[0]), 0)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("needs it. Use layout='padded'", "needs it. Use orpo_layout: padded"),
        ("layout 'packed' cannot be: x. Use layout='auto'", "orpo_layout 'packed' cannot be: x. Use orpo_layout: auto"),
        ("beta is -1.0: it weighs", "orpo_alpha is -1.0: it weighs"),
        ("over max_tokens_per_batch=90: lower max_length", "over orpo_max_tokens_per_batch: 90: lower sequence_len"),
        ("make it with ORPOCollator(..., layout='padded')", "set orpo_layout: padded"),
        ("with modules_to_save=['lm_head']", "with lora_modules_to_save: [lm_head]"),
        ("leave it out of target_modules", "leave it out of lora_target_modules"),
        ("set output_router_logits=False", "set overrides_of_model_config: {output_router_logits: false}"),
        ("the layout of the kernel beta", "the layout of the kernel beta"),
        ("orpo_layout: padded, orpo_max_prompt_length 3", "orpo_layout: padded, orpo_max_prompt_length 3"),
        ("kernel=chunked, layout=shared: 20 tokens", "kernel=chunked, layout=shared: 20 tokens"),
    ],
)  # fmt: skip
def test_words_are_those_of_the_config(message: str, expected: str) -> None:
    from orpo_plugins.integrations.axolotl_wording import in_yaml

    assert in_yaml(message) == expected


def messages() -> Iterator[tuple[str, str]]:
    """(file, text) of all that the package may say to a user of Axolotl."""
    for folder in ("orpo_plugins", "integrations", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if NOT_AXOLOTLS.search(path.stem):
                continue
            tree = ast.parse(path.read_text())
            prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                    yield path.name, node.value


def test_no_message_is_left_with_an_option_or_advice_of_python() -> None:
    from orpo_plugins.integrations.axolotl_wording import YAML_KEYS, in_yaml

    python = re.compile(
        rf"\b({'|'.join(YAML_KEYS)})=['\[TFN0-9]|tokenizer\.(?!apply)\w+|setup_chat_format|ORPOCollator\(\."
    )
    left = [(name, text) for name, text in messages() if " " in text and python.search(in_yaml(text))]
    assert left == []


def test_every_key_that_messages_name_is_one_of_axolotls() -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    from orpo_plugins.integrations.axolotl_arguments import ORPOInputArgs
    from orpo_plugins.integrations.axolotl_wording import NESTED, YAML_KEYS

    known = {*AxolotlInputConfig.model_fields, *ORPOInputArgs.model_fields}
    assert {*YAML_KEYS.values(), *NESTED.values(), "special_tokens", "chat_template"} <= known


def test_the_log_is_in_these_words_only_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    from orpo_plugins.integrations.axolotl_wording import yaml_words

    logger = logging.getLogger("orpo_plugins.integrations.hf_run_start")
    with yaml_words(), yaml_words():
        logger.warning("%s. layout='auto' goes on with 'padded'", "a user's layout='x'")
    logger.warning("layout='auto'")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["a user's layout='x'. orpo_layout: auto goes on with 'padded'", "layout='auto'"]


def test_the_trainers_errors_name_keys_that_fix_them(tmp_path: Path) -> None:
    tiny.model("Bloom").save_pretrained(tmp_path / "model")  # ALiBi: a shared prompt is impossible
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    settings = {
        "datasets": [dataset(write_rows(tmp_path / "rows.jsonl", tiny.rows(4)))],
        "val_set_size": 0,
        "max_steps": 1,
    }
    log = axolotl("train", write_config(tmp_path / "config.yml", **settings, orpo_layout="shared"), succeeds=False)
    assert re.search(r"ConfigError: orpo_layout 'shared' cannot be used here: .* Use orpo_layout: auto", log)
    assert "layout=padded" in axolotl("train", write_config(tmp_path / "config.yml", **settings, orpo_layout="auto"))
