"""`setup_chat_format`: ChatML for a base model, as TRL had it."""

import pytest
import torch

from orpo_plugins import ORPOCollator, setup_chat_format
from orpo_plugins.errors import ConfigError
from tests.kit import tiny
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer


def test_tokenizer_embeddings_and_configs_are_set_up() -> None:
    tokenizer = gpt2_tokenizer()
    before = len(tokenizer)
    model = tiny.model(vocab_size=before)
    old = model.get_input_embeddings().weight.detach().clone()
    returned = setup_chat_format(model, tokenizer)
    assert returned[0] is model
    assert returned[1] is tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == before + 2 == model.get_input_embeddings().weight.shape[0]
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == before + 2
    assert torch.equal(model.get_input_embeddings().weight[:before], old)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_id)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids


def test_the_template_is_chatml() -> None:
    _, tokenizer = setup_chat_format(tiny.model(vocab_size=400), gpt2_tokenizer())
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.tokenize("<|im_start|>user")[0] == "<|im_start|>"


def test_conversations_then_go_through_with_bos_once() -> None:
    _, tokenizer = setup_chat_format(tiny.model(vocab_size=400), gpt2_tokenizer())
    row = {"prompt": [{"role": "user", "content": "Q"}], "chosen": "A", "rejected": "B"}
    ids = ORPOCollator(tokenizer)([row])["input_ids"][0]
    assert tokenizer.decode(ids) == ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>")


def test_the_number_of_embeddings_may_be_rounded_up() -> None:
    model, tokenizer = setup_chat_format(tiny.model(vocab_size=400), gpt2_tokenizer(), resize_to_multiple_of=64)
    assert model.get_input_embeddings().weight.shape[0] == -(-len(tokenizer) // 64) * 64


def test_a_chat_template_that_is_there_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="has a chat template already: .* tokenizer.chat_template = None"):
        setup_chat_format(tiny.model(vocab_size=400), chatml_tokenizer())


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown format 'llama'; known: chatml"):
        setup_chat_format(tiny.model(vocab_size=400), gpt2_tokenizer(), format="llama")
