"""The demo's model where SmolLM2 is not at hand: a small Llama with random weights.

Its tokenizer is learnt from the demo's own texts, so that an answer has few tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIAL_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>"]


def write(folder: Path) -> str:
    """Writes model and tokenizer, and returns what they are."""
    tokenizer = train_tokenizer(texts(HERE / "train.jsonl"))
    model = small_llama(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{model.num_parameters() / 1e6:.1f} million random weights, {len(tokenizer)} tokens"


def texts(path: Path) -> list[str]:
    """Every message of a file of preference rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [message["content"] for row in rows for part in row.values() for message in part]


def train_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens; its chat template comes from Axolotl's `chat_template: chatml`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*corpus, "system user assistant"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>")


def small_llama(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Four layers of width 128, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config)
