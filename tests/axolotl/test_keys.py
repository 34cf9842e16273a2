"""Every `orpo_*` key of a config reaches the loss of a real run: its first step is the loss computed here."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from orpo_plugins import ORPOCollator, errors, get_plugin_manager, orpo_forward
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.options import PairOptions
from tests.kit import tiny, tools
from tests.kit.axolotl_runs import axolotl, dataset, folder_with_model, logged, needs_axolotl, write_config, write_rows
from tests.kit.compare import assert_within

needs_axolotl()

PLUGIN = """
from orpo_plugins import hookimpl
from orpo_plugins.hooks.types import Kernel
from orpo_plugins.kernels.reference import reference_head
from orpo_plugins.objective import LossTerm

def told(hidden, weight, bias, predictions, objective, options):
    print(f"kernel told: memory_budget={options.memory_budget}, weights={predictions.weights is not None}", flush=True)
    return reference_head(hidden, weight, bias, predictions, objective, options)

@hookimpl
def orpo_kernels():
    return [Kernel(name="told", compute=told, priority=-300)]

@hookimpl
def orpo_loss_terms():
    return [LossTerm(name="sure", compute=lambda pairs: pairs.chosen ** 2)]
"""


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(row: dict[str, str]) -> dict[str, Any]:
    """A row whose answers go on for two turns, the rejected one missing."""
    answer = [turn("assistant", row["chosen"].strip()), turn("user", "later"), turn("assistant", "please today")]
    return {"prompt": [turn("user", row["prompt"])], "chosen": answer, "rejected": None}


def dialogue(row: dict[str, str]) -> dict[str, Any]:
    """A row whose answers go on for two turns."""
    rejected = [turn("assistant", "never"), turn("user", row["prompt"]), turn("assistant", row["rejected"].strip())]
    return {**conversation(row), "rejected": rejected}


STRINGS = [{**row, "weight": 2.0 if index == 1 else 1.0} for index, row in enumerate(tiny.rows(4, longest=20))]
TURNS = [dialogue(row) if index else conversation(row) for index, row in enumerate(tiny.rows(4, seed=1))]
TEMPLATE = tiny.CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }}\n")  # as ChatML has it
WIDE = {"initializer_range": 0.2}  # so that the answers' odds differ
DATA = {"sft_rows": True, "train_on": "last", "template_strings": True, "repeat_eos": True}
LENGTHS = {"max_prompt_length": 9, "max_completion_length": 8, "truncation_mode": "keep_start"}
LOSS = {"odds_temperature": 2.0, "nll_normalization": "pair", "loss_terms": {"sure": 0.25}}
# One batch of all eight rows, where micro_batch_size alone would make eight.
BATCHES = {"max_tokens_per_batch": 10_000, "step_strategy": "tokens"}
OTHERS = {
    "kernel": "told",
    "layout": "packed",
    "layout_check": False,
    "show_example": False,
    "nll_over": "completion",
    "memory_budget": 12345678,
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an installed package that has a kernel and a loss term, which are registered here too."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "told_plugin.py").write_text(PLUGIN)
    (folder / "told_plugin-1.dist-info").mkdir()
    (folder / "told_plugin-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: told-plugin\nVersion: 1\n"
    )
    (folder / "told_plugin-1.dist-info" / "entry_points.txt").write_text("[orpo_plugins]\ntold = told_plugin\n")
    module = ModuleType("told_plugin")
    exec(PLUGIN, module.__dict__)
    get_plugin_manager().register(module)
    yield folder
    get_plugin_manager().unregister(module)


def expected(**changes: Any) -> dict[str, float]:
    """Loss and figures of one step over all rows, with every option as in the run but for `changes`."""
    given = {**DATA, **LENGTHS, **LOSS, **OTHERS, "alpha": 0.5, **changes}

    def pick(names: Iterable[str]) -> dict[str, Any]:
        return {name: given[name] for name in names if given[name] is not None}

    options = PairOptions(max_length=256, **pick([*DATA, *LENGTHS]))
    pairs = [row for rows in (STRINGS, TURNS) for row in prepare_dataset(rows, tiny.tokenizer(TEMPLATE), options)[0]]
    batch = ORPOCollator(tiny.tokenizer(), sft_rows=True, **pick(["nll_over"]))(pairs)
    with torch.no_grad():
        out = orpo_forward(tiny.model(**WIDE), batch, beta=given["alpha"], kernel="told", **pick(LOSS))
    paired = out.metrics["rejected_lengths"] > 0
    return {
        "loss": float(out.loss),
        "nll_loss": float(out.nll_loss),
        "log_odds_ratio": float((out.log_odds_ratio * out.metrics["weights"])[paired].sum() / 8),
    }


def test_every_key_takes_effect(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orpo_plugins.integrations.axolotl_arguments import AXOLOTL_KEYS, KEYS

    monkeypatch.setenv("PYTHONPATH", str(plugin))
    folder = folder_with_model(tmp_path, **WIDE)
    tiny.tokenizer(TEMPLATE).save_pretrained(folder / "model")
    keys = {f"orpo_{name}": value for name, value in {**DATA, **LENGTHS, **LOSS, **BATCHES, **OTHERS}.items()}
    keys["orpo_alpha"] = 0.5
    assert set(keys) == {*AXOLOTL_KEYS, *KEYS}
    config = write_config(
        folder / "config.yml",
        datasets=[
            dataset(write_rows(folder / "strings.jsonl", STRINGS)),
            dataset(write_rows(folder / "turns.jsonl", TURNS)),
        ],
        excess_length_strategy="truncate",
        micro_batch_size=1,
        group_by_length=True,
        max_steps=None,  # the epoch, which is one step
        **keys,
    )
    log = axolotl("train", config)
    assert re.search(r"kernel=told, layout=packed, nll_over=completion, nll_normalization=pair, beta=0.5", log)
    assert "kernel told: memory_budget=12345678, weights=True" in log
    assert "4 of 4 rows kept" in log
    assert "one pair as it is trained" not in log
    assert log.count("kernel told") == 1  # the one step's: the check would have asked twice before
    assert re.search(r"layout=packed: \d+ tokens per epoch, \d+ as padded in batches of 1 pairs", log)
    (first,) = (entry for entry in logged(folder / "out") if "loss" in entry)
    for key, value in expected().items():
        assert_within(first[key], value, 1e-5, key)


@pytest.mark.parametrize("name", [*DATA, *LENGTHS, *LOSS, "nll_over", "alpha"])
def test_without_any_one_of_them_the_first_step_would_be_another(name: str, plugin: Path) -> None:
    default = {"alpha": 0.1}.get(name)
    if name == "sft_rows":
        with pytest.raises(errors.RowError, match=r"sft_rows=True"):
            expected(**{name: default})
    else:
        assert abs(expected(**{name: default})["loss"] / expected()["loss"] - 1) > 1e-4


def test_what_argillas_type_gets_wrong_is_right(tmp_path: Path) -> None:
    """System messages, histories that differ, tools, columns under other names, a template of the dataset's own."""
    from datasets import load_from_disk

    folder = folder_with_model(tmp_path)
    template = tools.TEMPLATE
    asked = turn("user", "order")
    answered = {name: value for name, value in tools.ANSWERED.items() if name != "tools"}
    kinds: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
        "system": (
            [
                {name: [turn("system", "please"), asked, turn("assistant", text)] for name, text in answers.items()}
                for answers in ({"chosen": "gladly", "rejected": "never"}, {"chosen": "today", "rejected": "later"})
            ],
            {},
        ),
        "histories": (
            [
                {
                    "chosen": [asked, turn("assistant", "desk"), turn("user", "today"), turn("assistant", "gladly")],
                    "rejected": [asked, turn("assistant", "call"), turn("user", "never"), turn("assistant", "sorry")],
                }
            ],
            {},
        ),
        "tools": ([{**answered, "functions": json.dumps(tools.TOOLS)}], {"field_tools": "functions"}),
        "renamed": (
            [
                {
                    "talk": [asked],
                    "good": turn("assistant", "gladly"),
                    "bad": turn("assistant", "never"),
                    "who": "please",
                }
            ],
            {"field_messages": "talk", "field_chosen": "good", "field_rejected": "bad", "field_system": "who"},
        ),
    }
    entries = [
        dataset(
            write_rows(folder / f"{name}.jsonl", rows),
            type="orpo",
            chat_template="jinja",
            chat_template_jinja=template,
            **fields,
        )
        for name, (rows, fields) in kinds.items()
    ]
    axolotl("preprocess", write_config(folder / "config.yml", datasets=entries))
    cached = load_from_disk(next(iter((folder / "prepared").glob("orpo-*"))))
    found = sorted(zip(cached["chosen_input_ids"], cached["rejected_labels"], strict=True))
    read = {"talk": "conversations", "good": "chosen", "bad": "rejected", "who": "system", "functions": "tools"}
    rows = [{read.get(name, name): value for name, value in row.items()} for some, _ in kinds.values() for row in some]
    pairs = prepare_dataset(rows, tiny.tokenizer(template))[0]
    assert found == sorted(zip(pairs["chosen_input_ids"], pairs["rejected_labels"], strict=True))
    texts = [tiny.tokenizer().decode(ids) for ids, _ in found]
    assert "<s><|system|>please</s><|user|>order</s><|assistant|>gladly</s>" in texts
    assert sum('[order {"parcel": "desk"}]' in text for text in texts) == 1


def test_bf16_may_be_true_on_a_cpu(tmp_path: Path) -> None:
    folder = folder_with_model(tmp_path)
    rows = dataset(write_rows(folder / "rows.jsonl", tiny.rows(8)))
    config = write_config(folder / "config.yml", datasets=[rows], max_steps=1, bf16=True)
    axolotl("train", config)
    loss = next(entry["loss"] for entry in logged(folder / "out") if "loss" in entry)
    in_fp32 = write_config(folder / "fp32.yml", datasets=[rows], max_steps=1, output_dir="fp32")
    axolotl("train", in_fp32)
    expected = next(entry["loss"] for entry in logged(folder / "fp32") if "loss" in entry)
    assert loss != expected
    assert_within(loss, expected, 0.02)
