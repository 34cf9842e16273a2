"""The tokenizer of a model's folder, and that of a processor."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_MISTRAL_FILES = ("tekken.json", "*.model.v*")


def load(name: str, **options: Any) -> Any:
    """`AutoTokenizer.from_pretrained`, and mistral-common's where its file is all that stands in the folder.

    transformers (5.16 to 5.24) looks for that file beside a model's configuration and under one name only, so that it
    does not find what it has saved beside an adapter, or as a SentencePiece file.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        if not any(file for pattern in _MISTRAL_FILES for file in Path(name).glob(pattern)):
            raise
    from transformers.tokenization_mistral_common import MistralCommonBackend

    return MistralCommonBackend.from_pretrained(name)


def of(processing_class: Any) -> Any:
    """The tokenizer itself, or that of a processor; a tokenizer may have one of another package inside."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    return getattr(processing_class, "tokenizer", processing_class)
