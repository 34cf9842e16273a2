"""Tiny encoder-decoder models, their tokenizer and a batch for them."""

from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from orpo_plugins import ORPOCollator
from tests.kit import tiny

EOS = 2


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Closes every text with EOS, as T5's does, and opens it with BOS where asked to, as BART's does."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    if not bos:
        made.bos_token = None
    made.chat_template = tiny.CHAT_TEMPLATE.replace("{{ bos_token }}", "").replace("{{ eos_token }}", "")
    return made


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "vocab_size": 320, "d_model": 32}
T5 = {**IDS, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **IDS,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "decoder_start_token_id": EOS,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", {**T5, "tie_word_embeddings": True}),
    "t5 1.1": ("T5", {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "bart": ("Bart", BART),
    "marian": ("MarianMT", BART),
}


def build(name: str) -> PreTrainedModel:
    family, sizes = MODELS[name]
    suffix = "Model" if family == "MarianMT" else "ForConditionalGeneration"
    cls = getattr(transformers, family + suffix)
    torch.manual_seed(0)
    model: PreTrainedModel = cls(cls.config_class(**sizes))
    for name, parameter in model.named_parameters():
        # Added to all scores of a query alike: its gradient is zero, and rounding is all there is to compare.
        parameter.requires_grad_(not name.endswith("k_proj.bias"))
    if hasattr(model, "final_logits_bias"):  # zero in new models, trained in Marian's checkpoints
        model.final_logits_bias.normal_()
    return model


def batch(**options: Any) -> dict[str, Any]:
    return ORPOCollator(tokenizer(), layout="seq2seq", **options)(tiny.rows(3))
