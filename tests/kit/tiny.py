"""Tiny models, tokenizers and rows, made on the spot: nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.kit.tokenizers import trained

SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ("refund", "order", "parcel", "invoice", "gladly", "sorry", "today", "please", "later", "never", "desk", "call")


def tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens, whose chat template opens with BOS and closes each message with EOS."""
    inner = trained([" ".join(WORDS)], byte_level=True, special=list(SPECIAL), vocab_size=320)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model(name: str = "Llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A two-layer causal LM in fp32, seeded."""
    cls = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed)
    made: PreTrainedModel = cls(cls.config_class(**{**SIZES, **changes}))
    return made


def mixture_of_experts(**changes: Any) -> PreTrainedModel:
    """A Mixtral whose router's load-balancing loss is part of the loss."""
    return model("Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.02, **changes)


def saved(folder: Path, **changes: Any) -> str:
    """The path of a saved tiny model with its tokenizer."""
    model(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def _words(count: int, generator: torch.Generator) -> str:
    picks = torch.randint(len(WORDS), (count,), generator=generator).tolist()
    return " ".join(WORDS[pick] for pick in picks)


def rows(count: int, *, longest: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """Rows of strings; lengths between 1 and `longest` words, so that micro-batches differ in size."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count, 3), generator=generator).tolist()
    return [
        {
            "prompt": _words(prompt, generator),
            "chosen": " gladly " + _words(chosen, generator),
            "rejected": " never " + _words(rejected, generator),
        }
        for prompt, chosen, rejected in lengths
    ]


def skewed_rows(count: int, *, longest: int = 60) -> list[dict[str, str]]:
    """Rows whose lengths differ ten to one, long and short ones in turns of five and three."""
    short, long = rows(count, longest=longest // 10, seed=1), rows(count, longest=1, seed=2)
    generator = torch.Generator().manual_seed(3)
    for row in long:
        for column, size in (("prompt", longest // 2), ("chosen", longest), ("rejected", longest // 2)):
            row[column] += " " + _words(size, generator)
    return [long[index] if index % 8 in (0, 3, 4) else short[index] for index in range(count)]


def conversations(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of message lists with an explicit prompt, a system message in every second one."""
    made = []
    for index, row in enumerate(rows(count, seed=seed)):
        system = [{"role": "system", "content": "please"}] if index % 2 else []
        made.append(
            {
                "prompt": [*system, {"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
                "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
            }
        )
    return made
