"""Small tokenizers of three kinds, trained on the spot."""

from collections.abc import Sequence
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}{{ eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then it sleeps",
    "please cancel my order because the parcel never arrived, thank you",
    "of course, your refund is on its way: number 1234 will reach you tomorrow",
    "unbelievable answers are answered unbelievably well by answering machines",
)


def trained(corpus: Sequence[str], *, byte_level: bool, special: list[str], vocab_size: int) -> Any:
    """A BPE of `tokenizers`, byte-level as GPT-2's or with `▁` for spaces as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if byte_level:
        inner, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        inner, alphabet = Tokenizer(models.BPE(unk_token="<unk>")), [chr(code) for code in (10, *range(33, 127))]
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([*corpus] * 3, trainer)
    return inner


def chatml_tokenizer() -> Any:
    """Byte-level BPE with BOS `<s>`, EOS `<|im_end|>`, PAD `<pad>` and a ChatML template that writes no BOS."""
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    inner = trained(_CORPUS, byte_level=True, special=special, vocab_size=420)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    made.chat_template = CHATML
    return made


def inst_tokenizer() -> Any:
    """BPE that writes spaces as `▁`; its post-processor adds BOS, and so does its template."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = trained(_CORPUS, byte_level=False, special=["<unk>", "<s>", "</s>"], vocab_size=300)
    inner.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    made.chat_template = INST
    return made


def gpt2_tokenizer() -> Any:
    """Byte-level BPE whose only special token is `<|endoftext|>`: no pad token, no chat template."""
    from transformers import PreTrainedTokenizerFast

    inner = trained(_CORPUS, byte_level=True, special=["<|endoftext|>"], vocab_size=400)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end, unk_token=end)
