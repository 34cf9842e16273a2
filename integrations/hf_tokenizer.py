"""How to load the tokenizer of a model's folder, and how to get that of a processor."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_MISTRAL_FILES = ("tekken.json", "*.model.v*")


def load(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`, or mistral-common's tokenizer where the folder has only its file.

    transformers (5.16 to 5.24) looks for that file only beside a model's configuration, and only under one name.  So it
    does not find the file that it has saved beside an adapter, nor a SentencePiece file.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        if not any(file for pattern in _MISTRAL_FILES for file in Path(name).glob(pattern)):
            raise
    from transformers.tokenization_mistral_common import MistralCommonBackend

    tokenizer: PreTrainedTokenizerBase = MistralCommonBackend.from_pretrained(name)
    return tokenizer


def of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a processor."""
    if not isinstance(processing_class, PreTrainedTokenizerBase):  # whose own `tokenizer` may be another package's
        processing_class = getattr(processing_class, "tokenizer", processing_class)
    tokenizer: PreTrainedTokenizerBase = processing_class
    return tokenizer
