"""The fingerprint of a tokenized dataset, under which the cache of `datasets` finds it again."""

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
    row_tokenizer,
    row_values,
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
    row_tokenizer,
    types,
)
"""The modules whose code decides how a row is tokenized."""


def fingerprint(dataset: Any, builder: PairBuilder, mapped: object) -> str:
    """A hash of everything that the tokenized rows depend on; `mapped` is the class that makes them.

    The default hash of `datasets` pickles the mapped function together with the tokenizer.  The state of a fast
    tokenizer changes with use, so the cache would rarely be found again.
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
    """The code of the file that defines `thing`."""
    try:
        return inspect.getsource(inspect.getmodule(thing) or thing)
    except (OSError, TypeError):
        return repr(thing)


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """Everything in a tokenizer that token ids depend on, as plain values."""
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
    # Calls that pad or truncate change these two.  Tokenization here does neither.
    state["truncation"] = state["padding"] = None
    return [*identity, json.dumps(state, sort_keys=True)]


def _file_identity(tokenizer: Any) -> list[Any]:
    """For a tokenizer of mistral-common: the hash of its only file, and the version of the package.

    The file names the format of conversations, and the code of the package writes it.
    """
    path = getattr(tokenizer, "_tokenizer_path", None)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path else sorted(tokenizer.get_vocab().items())
    package = type(getattr(tokenizer, "tokenizer", tokenizer)).__module__.partition(".")[0]
    return [content, getattr(sys.modules.get(package), "__version__", None)]
