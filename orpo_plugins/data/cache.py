"""By what a tokenized dataset is found again in the cache of `datasets`."""

import dataclasses
import hashlib
import inspect
import json
import sys
from typing import Any

import orpo_plugins
from orpo_plugins.data import (
    chat_id_pairs,
    chat_templates,
    conversations,
    encoder_decoder_pairs,
    pairs,
    row_formats,
    row_values,
    tokenized_rows,
)
from orpo_plugins.data.pairs import PairBuilder
from orpo_plugins.hooks import plugins, types

_OURS = (
    chat_id_pairs,
    chat_templates,
    conversations,
    encoder_decoder_pairs,
    pairs,
    row_formats,
    row_values,
    tokenized_rows,
    types,
)
"""The modules that decide what becomes of a row."""


def fingerprint(dataset: Any, builder: PairBuilder, mapped: object) -> str:
    """A name for the result that stays the same as long as nothing that decides it changes; `mapped` makes the rows.

    The package's own hash pickles the function with the tokenizer in it, and a fast tokenizer's state changes with
    use: the cache would hardly ever be found again.
    """
    from datasets.fingerprint import Hasher

    modules = [inspect.getmodule(mapped), *_OURS]
    formats = [(row_format.name, _source(row_format.parse)) for row_format in plugins.row_formats()]
    return str(
        Hasher.hash(
            [
                dataset._fingerprint,
                orpo_plugins.__version__,
                [_source(module) for module in modules],
                formats,
                dataclasses.astuple(builder.options),
                tokenizer_identity(builder.tokenizer),
            ]
        )
    )


def _source(thing: Any) -> str:
    """The code of the file in which something is defined."""
    try:
        return inspect.getsource(inspect.getmodule(thing) or thing)
    except (OSError, TypeError):
        return repr(thing)


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """Everything about a tokenizer that decides ids, as plain values."""
    identity: list[Any] = [
        type(tokenizer).__qualname__,
        str(getattr(tokenizer, "chat_template", None)),
        str(getattr(tokenizer, "special_tokens_map", None)),
        tokenizer.all_special_ids,
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if chat_id_pairs.gives_chats_as_ids(tokenizer):
        return [*identity, *_file_identity(tokenizer)]
    if backend is None:
        settings = [str(getattr(tokenizer, name, None)) for name in ("added_tokens_decoder", "init_kwargs")]
        return [*identity, sorted(tokenizer.get_vocab().items()), *settings]
    state = json.loads(backend.to_str())
    # These two change with every call that pads or truncates, and no call here does either.
    state["truncation"] = state["padding"] = None
    return [*identity, json.dumps(state, sort_keys=True)]


def _file_identity(tokenizer: Any) -> list[Any]:
    """The content of the one file that mistral-common's tokenizers are made of, and that package's version.

    The file says which format conversations have, and the package's code writes it.
    """
    path = getattr(tokenizer, "_tokenizer_path", None)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path else sorted(tokenizer.get_vocab().items())
    package = type(getattr(tokenizer, "tokenizer", tokenizer)).__module__.partition(".")[0]
    return [content, getattr(sys.modules.get(package), "__version__", None)]
