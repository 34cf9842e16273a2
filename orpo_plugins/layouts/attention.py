"""The attention function behind the layouts *packed* and *shared*, for transformers' `AttentionInterface`.

A batch of these layouts is one row cut into spans (`layouts/spans.py`).  The rows of a span attend causally
to themselves and to all rows of the span's context, if it has one:

    out[span] = softmax(scale * q[span] @ k[context + span].T + causal) @ v[context + span]

No mask of the whole row is ever built.  A model's attention implementation is replaced, once, by one of our own
name that does this where the batch carries spans and otherwise calls the implementation it replaces, masks
included: evaluation, generation and padded batches see no difference.  It stays in place after a forward pass
because gradient checkpointing runs the layers again during the backward pass.
"""

import functools
import importlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orpo_plugins.errors import ModelError
from orpo_plugins.layouts.spans import SPANS, Span, Spans
from orpo_plugins.models.head import attention_implementation, unwrap_model

PREFIX = "orpo_"
"""Our name for an implementation is this and the name of the one replaced, `orpo_sdpa`."""
REPLACEABLE = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Implementations that compute plain softmax attention, so that ours means the same."""
NOT_UNDERSTOOD = ("position_bias", "indices", "block_indices", "sinks")
"""Keywords by which layers change their scores in ways that no span attention here computes."""

_with_config: "weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]]" = weakref.WeakKeyDictionary()
"""Of every prepared model, the modules that read their attention implementation from a configuration."""
_masks_off = False  # a plain global, since torch.compile can guard on one and cannot read a ContextVar


def prepare(model: nn.Module) -> None:
    """Puts the span attention in front of the attention implementation of `model` and of all its submodules."""
    inner = unwrap_model(model)
    modules = [module for module in inner.modules() if _reads_config(module)]
    _with_config[inner] = [weakref.ref(module) for module in modules]
    _prepare_each(modules)


def _prepare_again(model: nn.Module) -> None:
    """`prepare`, without a walk over all modules where it has been called before: adapters multiply them."""
    modules = [module() for module in _with_config.get(unwrap_model(model), ())]
    if not modules or None in modules:
        prepare(model)
    else:
        _prepare_each(modules)


def _prepare_each(modules: Iterable[Any]) -> None:
    for module in modules:
        original = module.config._attn_implementation
        if original not in REPLACEABLE:
            continue
        name = PREFIX + original
        AttentionInterface.register(name, functools.partial(span_attention, original=original))
        AttentionMaskInterface.register(name, functools.partial(mask, original=original))
        # Not `set_attn_implementation`: it would check for the hardware again, and import flash-attn for its name.
        module.config._attn_implementation_internal = name


def is_prepared(model: nn.Module) -> bool:
    """Whether spans given to `model` reach this module; a model that is not prepared would ignore them."""
    return str(attention_implementation(model)).startswith(PREFIX)


def configs(model: nn.Module) -> list[Any]:
    """Every transformers configuration that a submodule of `model` reads its attention implementation from."""
    return list({id(m.config): m.config for m in model.modules() if _reads_config(m)}.values())


def _reads_config(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation")


@contextmanager
def without_masks(model: nn.Module) -> Iterator[None]:
    """While entered, `model` builds no attention masks: spans say all that these would.  Prepares it where needed."""
    global _masks_off
    _prepare_again(model)  # every time: a part of it may have been given another implementation since
    if not is_prepared(model):
        name = attention_implementation(model)
        raise ModelError(
            f"{type(unwrap_model(model)).__name__} has the attention implementation {name!r}, which would not see "
            f"{SPANS!r}; known are {', '.join(REPLACEABLE)}. Use one of them, or layout='padded'"
        )
    before, _masks_off = _masks_off, True
    try:
        yield
    finally:
        _masks_off = before


def mask(*args: Any, original: str, **kwargs: Any) -> Any:
    """The mask that the replaced implementation would get, or None inside `without_masks`."""
    return None if _masks_off else ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)


def span_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    original: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a layer calls: [1, heads, S, d] queries, keys and values in, [1, S, heads, d] out."""
    spans = kwargs.pop(SPANS, None)
    if spans is None:
        if _masks_off:
            raise ModelError(
                f"{type(module).__name__} was not given the keyword {SPANS!r} that its model was called with: some "
                "layer does not pass keywords on. Use layout='padded'"
            )
        return _replaced(module, original)(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and _masks_off:
        raise ModelError(f"{type(module).__name__} makes an attention mask of its own: use layout='padded'")
    return attend(query, key, value, spans, implementation=original, **_options(module, kwargs)), None


# Lengths differ in every batch: one graph break per layer instead of compiling for each of them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str = "sdpa",
) -> Tensor:
    """Span attention.

    Args:
        query: [1, Hq, S, d].
        key: [1, Hkv, S, d], Hq a multiple of Hkv; not copied to Hq heads, unless torch's varlen_attn needs it (< 2.12).
        value: [1, Hkv, S, dv].
        spans: cover the S rows.
        scale: multiplies the scores; default d ** -0.5.
        dropout: probability of dropping an attention weight.
        window: each row sees itself and the `window` - 1 positions before it; None for all.
        softcap: c of c * tanh(scores / c).
        sinks: [Hq] extra scores that take part in the softmax and contribute nothing.
        implementation: the one that was replaced. Of flash_attention_2, 3 and 4 the function is called here too.

    Returns:
        [1, S, Hq, dv], contiguous.
    """
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} of a batch that was laid out in one row: "
            "key-value caches and virtual tokens need layout='padded'"
        )
    settings = _Settings(scale=scale, dropout=dropout, window=window, softcap=softcap)
    if sinks is None and (varlen := _varlen(query, key, value, settings, implementation)):
        return _attend_varlen(varlen, query, key, value, spans)
    # Split rather than sliced: the gradient of a slice is a row of zeros to be filled and added, for every span.
    lengths = [span.length for span in spans.spans]
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    index = {span.start: number for number, span in enumerate(spans.spans)}
    written_out = softcap is not None or sinks is not None
    parts = []
    for number, span in enumerate(spans.spans):
        context = _visible_context(span, window)
        before = index[span.context_start]
        all_keys = _with_context(keys[number], keys[before], context)
        all_values = _with_context(values[number], values[before], context)
        most = _rows_at_once(span.length, all_keys, window, written_out)
        start = all_keys.shape[2] - span.length
        for rows in torch.split(queries[number], most, dim=2):
            stop = start + rows.shape[2]
            first = 0 if window is None else max(0, start - window + 1)
            seen = slice(first, stop)
            own_keys, own_values = _part(all_keys, seen), _part(all_values, seen)
            bias = _bias(spans, start - first, rows, window)
            if written_out:
                part = _written_out(rows, own_keys, own_values, bias, scale, dropout, softcap, sinks)
            else:
                part = F.scaled_dot_product_attention(
                    rows,
                    own_keys,
                    own_values,
                    attn_mask=bias,
                    dropout_p=dropout,
                    is_causal=bias is None,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            parts.append(part.transpose(1, 2))
            start = stop
    return torch.cat(parts, dim=1)


def _options(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `attend`, from those that transformers' layers use."""
    for name in NOT_UNDERSTOOD:
        if kwargs.get(name) is not None:
            raise ModelError(f"{type(module).__name__} passes {name!r} to its attention: use layout='padded'")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{type(module).__name__} does not attend causally: use layout='padded'")
    return {
        "scale": kwargs.get("scaling"),
        "dropout": kwargs.get("dropout") or 0.0,
        "window": kwargs.get("sliding_window") or None,
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }


Replaced = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function of transformers."""


def _replaced(module: nn.Module, original: str) -> Replaced:
    if original == "eager":
        # Each model file has its own, under this name; a wrapper's subclass (FSDP2) lives in another file.
        files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
        found: Replaced = next(f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward"))
        return found
    return ALL_ATTENTION_FUNCTIONS[original]  # type: ignore[no-any-return]


def _visible_context(span: Span, window: int | None) -> slice | None:
    """The rows of the context that at least the span's first row sees, counted from the context's first."""
    length = span.context_length if window is None else min(span.context_length, window - 1)
    return slice(span.context_length - length, span.context_length) if length else None


def _with_context(own: Tensor, before: Tensor, context: slice | None) -> Tensor:
    return own if context is None else torch.cat([before[:, :, context], own], dim=2)


def _part(whole: Tensor, seen: slice) -> Tensor:
    """Some of the rows; all of them without a slice, whose gradient would be copied."""
    return whole if seen.stop - seen.start == whole.shape[2] else whole[:, :, seen]


def _rows_at_once(length: int, keys: Tensor, window: int | None, written_out: bool) -> int:
    """How many of a span's rows to take together: those of one call are scored against all keys that any of them sees.

    torch's kernel for CPUs scores causal rows against whole blocks of 512 keys, up to twice as many as they see.
    """
    if keys.device.type == "cpu" and keys.shape[2] <= 1024:
        return 128
    return 512 if written_out or window is not None else length


def _bias(spans: Spans, before: int, rows: Tensor, window: int | None) -> Tensor | None:
    """[rows, before + rows] to add to the scores of rows that follow `before` keys; None for plain causal attention.

    In the queries' dtype, since scaled_dot_product_attention would convert a boolean one at every layer.
    """
    length = rows.shape[2]
    if not before and (window is None or length <= window):
        return None

    def make() -> Tensor:
        distance = (
            torch.arange(before, before + length, device=rows.device)[:, None]
            - torch.arange(before + length, device=rows.device)[None, :]
        )
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=rows.dtype, device=rows.device).masked_fill_(hidden, float("-inf"))

    return spans.derived((before, length, window, rows.dtype, rows.device), make)  # type: ignore[no-any-return]


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what no fused function offers, in plain operations; the softmax is in fp32."""
    heads, groups = query.shape[1], key.shape[1]
    grouped = query.reshape(query.shape[0], groups, heads // groups, *query.shape[2:])
    scores = grouped @ key[:, :, None].transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is None:
        rows = scores.shape[-1]
        bias = torch.full((rows, rows), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores = scores + bias
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, groups, heads // groups, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return (F.dropout(weights, dropout) @ value[:, :, None]).flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a variable-length function is told besides tensors and lengths."""

    scale: float | None
    dropout: float
    window: int | None
    softcap: float | None


def _attend_varlen(function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """All spans in one call with different query and key lengths; `function` aligns them at their ends."""
    offsets = spans.derived(("offsets", query.device), lambda: _offsets(spans, query.device))
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if offsets.key_rows is not None:
        # At most two spans use a row, so that the sum of its gradients does not depend on their order.
        key, value = key.index_select(0, offsets.key_rows), value.index_select(0, offsets.key_rows)
    out = function(query, key, value, offsets.queries, offsets.keys, offsets.longest_query, offsets.longest_key)
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # flash-attn 4 returns its normalizers as well
    return attended[None]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Offsets:
    """Spans as variable-length functions want them."""

    queries: Tensor
    """int32 [spans + 1]: cumulative lengths."""
    keys: Tensor
    """The same for context and own rows together."""
    key_rows: Tensor | None
    """int64 [keys[-1]]: which row each key is; None where it is the identity."""
    longest_query: int
    longest_key: int


def _offsets(spans: Spans, device: torch.device) -> _Offsets:
    queries = [span.length for span in spans.spans]
    keys = [span.context_length + span.length for span in spans.spans]
    pieces = [
        torch.arange(start, start + length)
        for span in spans.spans
        for start, length in ((span.context_start, span.context_length), (span.start, span.length))
    ]
    return _Offsets(
        queries=F.pad(torch.tensor(queries, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device),
        keys=F.pad(torch.tensor(keys, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device),
        key_rows=torch.cat(pieces).to(device) if queries != keys else None,
        longest_query=max(queries),
        longest_key=max(keys),
    )


Varlen = Callable[..., Any]
"""(queries [T, Hq, d], keys, values, two cumulative lengths, two longest lengths) -> [T, Hq, d], and perhaps more."""


def _varlen(query: Tensor, key: Tensor, value: Tensor, settings: _Settings, implementation: str) -> Varlen | None:
    """The variable-length attention for these tensors, causal and with `settings`; None without one.

    The user's own choice comes first, then torch's, then flash-attn's.
    """
    width, grouped = query.shape[-1], query.shape[1] != key.shape[1]
    if not _runs_flash_attention(query.device) or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if width != value.shape[-1] or width > 256 or width % 8:
        return None
    chosen = None
    # flash-attn 4 has had versions whose soft-cap has no gradient.
    if implementation.startswith("flash_attention") and (implementation[-1] != "4" or settings.softcap is None):
        (_, chosen, *_), _ = lazy_import_flash_attention(implementation)
    own = _import("torch.nn.attention.varlen", "varlen_attn")
    same_heads = torch_varlen(own, width, settings, grouped=False)
    return (
        flash_attn_varlen(chosen, settings)
        or torch_varlen(own, width, settings, grouped=grouped)
        or flash_attn_varlen(_import("flash_attn", "flash_attn_varlen_func"), settings)
        or (same_heads and functools.partial(_with_repeated_heads, same_heads))
    )


def _runs_flash_attention(device: torch.device) -> bool:
    """NVIDIA's GPUs since Ampere, and AMD's."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def torch_varlen(function: Varlen | None, width: int, settings: _Settings, *, grouped: bool) -> Varlen | None:
    """`torch.nn.attention.varlen.varlen_attn` with `settings`; None where its version lacks one of them.

    torch 2.10 has `is_causal` alone, 2.11 `scale` and `window_size` in its place, 2.12 `enable_gqa` as well.
    """
    if function is None or settings.dropout or settings.softcap is not None:
        return None
    keywords: dict[str, Any] = {}
    if settings.window is None and "is_causal" in _parameters(function):
        keywords["is_causal"] = True
    else:
        keywords["window_size"] = (-1 if settings.window is None else settings.window - 1, 0)
    if settings.scale not in (None, width**-0.5):
        keywords["scale"] = settings.scale
    if grouped:
        keywords["enable_gqa"] = True
    return _with_keywords(function, keywords)


def flash_attn_varlen(function: Varlen | None, settings: _Settings) -> Varlen | None:
    """flash-attn's `flash_attn_varlen_func` with `settings`; None where its version lacks one of them.

    All versions since 2.1 align queries and keys of different lengths at their ends.
    """
    if function is None or (settings.dropout and settings.softcap is not None):
        return None
    keywords: dict[str, Any] = {"causal": True, "softmax_scale": settings.scale}
    if settings.window is not None:
        keywords["window_size"] = (settings.window - 1, 0)
    if settings.dropout:
        keywords["dropout_p"] = settings.dropout
    if settings.softcap is not None:
        keywords["softcap"] = settings.softcap
    return _with_keywords(function, keywords)


def _with_repeated_heads(function: Varlen, query: Tensor, key: Tensor, value: Tensor, *lengths: Any) -> Any:
    """`function`, which takes as many heads of keys as of queries."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return function(query, key, value, *lengths)


def _with_keywords(function: Varlen, keywords: dict[str, Any]) -> Varlen | None:
    return functools.partial(function, **keywords) if keywords.keys() <= _parameters(function) else None


@functools.cache
def _parameters(function: Varlen) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _import(module: str, name: str) -> Varlen | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
