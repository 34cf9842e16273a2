"""Models and rows of the step benchmark."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from measure import CUDA

VOCABULARY = 32_000
MODELS = {
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "0.5b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 128_256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
"""Llama's shapes: one for CPUs, one of half a billion parameters, one of eight."""
FROM_DATA = ("demo", "demo-prompt-heavy")
"""Rows of a file: all that fit, and of these the ones whose prompt is at least four times as long as its answers."""
SHAPES = {"prompt-heavy": (640, 160), "answer-heavy": (64, 448)}
"""Mean tokens of prompts and of answers for made-up rows."""
Row = dict[str, str]


def llama(setting: dict[str, Any]) -> Any:
    """A random Llama, untied; the same weights in every process.  On a GPU in bf16, with the fastest attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import is_flash_attn_2_available

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, **MODELS[setting["model"]]}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**shape, **special, max_position_embeddings=max(2048, setting["longest"]))
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if CUDA else torch.float32,
            attn_implementation="flash_attention_2" if CUDA and is_flash_attn_2_available() else "sdpa",
        )
    model.get_output_embeddings().weight.requires_grad_(setting["head"] == "trainable")
    return model


def tokenizer_and_rows(setting: dict[str, Any]) -> tuple[Any, list[Row]]:
    """A byte-level BPE trained on the rows, and those rows that fit."""
    from transformers import PreTrainedTokenizerFast

    if setting["rows"] in FROM_DATA:
        rows = demo_rows(Path(setting["data"]))
    else:
        # Half prompt and half answer where a length is asked for; 8 for BOS, EOS and what splits at a border.
        half = setting["longest"] // 2 - 8
        rows = made_up_rows(*SHAPES.get(setting["rows"], (half, half)), even=setting["rows"] not in SHAPES)
    inner = byte_level_bpe([text for row in rows for text in row.values()], VOCABULARY, ["<pad>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )

    def wanted(row: Row) -> bool:
        prompt, *answers = (len(tokenizer(row[key])["input_ids"]) for key in ("prompt", "chosen", "rejected"))
        if setting["rows"] == "demo-prompt-heavy" and prompt < 4 * sum(answers) / 2:
            return False
        return prompt + max(answers) + 4 <= setting["longest"]  # BOS, EOS, and a token that splits at a border

    return tokenizer, [row for row in rows if wanted(row)]


def byte_level_bpe(texts: list[str], vocab_size: int, special_tokens: list[str]) -> Any:
    """A tokenizer of at most `vocab_size` tokens, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def demo_rows(path: Path) -> list[Row]:
    """ShareGPT rows as three strings, so that both trainers tokenize the same text."""
    names = {"human": "User", "gpt": "Assistant", "system": "System"}
    rows = []
    for row in json.loads(path.read_text()):
        turns = [f"{names.get(m['from'], m['from'])}: {m['value']}\n\n" for m in row["conversations"]]
        answers = {side: row[side]["value"] for side in ("chosen", "rejected")}
        if all(answers.values()) and answers["chosen"] != answers["rejected"]:
            rows.append({"prompt": "".join(turns) + "Assistant:", **{k: f" {v}" for k, v in answers.items()}})
    return rows


def made_up_rows(prompt_length: int, answer_length: int, *, even: bool = False) -> list[Row]:
    """Random words of one token each; lengths vary by a third, unless they are `even`."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = [f" {a}{b}" for a in syllables for b in syllables]

    def text(mean: int) -> str:
        length = mean if even else generator.randint(mean * 2 // 3, mean * 4 // 3)
        return "".join(generator.choices(words, k=length))

    return [
        {"prompt": text(prompt_length), "chosen": text(answer_length), "rejected": text(answer_length)}
        for _ in range(100)
    ]
