"""mistral-common's tokenizers, and rows for them."""

import functools
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.options import PairOptions
from tests.kit import tiny

for package in ("mistral_common", "sentencepiece"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'mistral-common[sentencepiece]'", allow_module_level=True)


FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240911.json",
}
MODES = ("test", "finetuning")
TOOLS = [
    {
        "type": "function",
        "function": {"name": "order", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
]


def file(name: str) -> Path:
    import mistral_common

    return Path(str(mistral_common.__file__)).parent / "data" / FILES[name]


@functools.cache  # reading one takes more than a second
def tokenizer(name: str = "tekken", mode: str = "test") -> Any:
    from transformers.tokenization_mistral_common import MistralCommonBackend

    return MistralCommonBackend(str(file(name)), mode=mode)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(number: int) -> list[dict[str, Any]]:
    return [{"id": f"call0000{number}", "type": "function", "function": {"name": "order", "arguments": {"n": number}}}]


STRINGS = {"prompt": "where is my parcel", "chosen": " it will reach you", "rejected": " no idea"}
ROW = {
    "prompt": [turn("system", "be kind"), turn("user", "where is my parcel")],
    "chosen": [turn("assistant", "it will reach you tomorrow")],
    "rejected": [turn("assistant", "it is lost")],
}
DIALOGUE = {
    "prompt": [turn("user", "hello"), turn("assistant", "how are you"), turn("user", "where is my parcel")],
    "chosen": [turn("assistant", "which one"), turn("user", "the small one"), turn("assistant", "tomorrow")],
    "rejected": [turn("assistant", "which"), turn("user", "the big one"), turn("assistant", "no idea")],
}
CALLS = {
    "prompt": [turn("user", "where is my parcel")],
    "chosen": [
        turn("assistant", "", tool_calls=call(1)),
        turn("tool", "at the depot", tool_call_id="call00001"),
        turn("assistant", "at the depot"),
    ],
    "rejected": [turn("assistant", "no idea")],
    "tools": TOOLS,
}


def prepared(row: dict[str, Any], made: Any, **options: Any) -> dict[str, Any]:
    dataset, _ = prepare_dataset([row], made, PairOptions(max_length=None, **options))
    return dict(dataset[0])


def saved(folder: Path, name: str) -> str:
    """A tiny Mistral with its tokenizer's file, as such models are published."""
    made = tokenizer(name)
    model = tiny.model("Mistral", vocab_size=len(made), hidden_size=8, intermediate_size=8)
    model.generation_config.max_new_tokens = 4
    model.save_pretrained(folder)
    shutil.copy(file(name), folder / ("tekken.json" if name == "tekken" else file(name).name))
    return str(folder)
