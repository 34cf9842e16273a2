"""`setup_chat_format`: ChatML for a base model and its tokenizer.  TRL had such a function up to 0.28."""

from typing import Any

from orpo_plugins.data.chat_id_pairs import gives_chats_as_ids
from orpo_plugins.errors import ConfigError

_BOS, _EOS = "<|im_start|>", "<|im_end|>"

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def setup_chat_format(
    model: Any, tokenizer: Any, format: str = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Gives a model and tokenizer without a chat template the ChatML format.

    The tokenizer gets the template and the special tokens `<|im_start|>` (BOS) and `<|im_end|>` (EOS and PAD).  The
    embeddings of the model are resized to the tokenizer.  Its config and generation config get the three token ids.

        model, tokenizer = setup_chat_format(model, tokenizer)

    Args:
        model: a causal LM of transformers; changed in place.
        tokenizer: its tokenizer; changed in place.
        format: "chatml".
        resize_to_multiple_of: rounds the number of embeddings up.

    Returns:
        The same model and tokenizer.

    Raises:
        ConfigError: the tokenizer has a chat template or a chat format already, or `format` is unknown.
    """
    if gives_chats_as_ids(tokenizer):
        raise ConfigError(
            f"{type(tokenizer).__name__} has a chat format of its own, which cannot be replaced: do not call "
            "setup_chat_format, and conversations are trained in that format"
        )
    if getattr(tokenizer, "chat_template", None) is not None:
        raise ConfigError(
            "the tokenizer has a chat template already: do not call setup_chat_format, or set "
            "tokenizer.chat_template = None first to replace it"
        )
    if format != "chatml":
        raise ConfigError(f"unknown format {format!r}; known: chatml")
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = _BOS, _EOS, _EOS
    tokenizer.add_special_tokens({"additional_special_tokens": [_BOS, _EOS]})
    tokenizer.chat_template = _CHATML
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resize_to_multiple_of)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
