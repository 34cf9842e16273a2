"""The attention function of the layouts *packed* and *shared*, for transformers' `AttentionInterface`.

A batch of these layouts is one row of S tokens, cut into spans (`layouts/spans.py`).  The tokens of a span attend
causally to each other.  If the span has a context, they also attend to all tokens of the context:

    out[span] = softmax(scale * q[span] @ k[context + span].T + causal) @ v[context + span]

Example: one pair in *shared*, with 3 prompt tokens P, 2 chosen tokens C and 2 rejected tokens R.  The first span is
prompt + chosen answer, without a context.  The second span is the rejected answer; its context is the prompt.

                  key   P P P C C R R
    query   P           x
            P           x x
            P           x x x
            C           x x x x
            C           x x x x x
            R           x x x     x
            R           x x x     x x

No [S, S] mask is ever built.

`prepare` replaces a model's attention implementation once.  The replacement looks at each batch.  If the batch has
spans, it computes span attention.  If not, it calls the replaced implementation with its usual mask, so evaluation,
generation and padded batches see no difference.  It stays in place after a forward pass, because gradient
checkpointing runs the layers again during the backward pass.
"""

import functools
import importlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

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
from orpo_plugins.models.state import state_of

PREFIX = "orpo_"
"""`orpo_sdpa` is the name under which the replacement of `sdpa` is registered."""
REPLACEABLE = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Implementations that compute plain softmax attention.  Span attention gives the same results as each of them."""
NOT_UNDERSTOOD = ("position_bias", "indices", "block_indices", "sinks")
"""Keywords that change a layer's scores in ways that span attention does not compute."""

_masks_off = False  # a plain global: torch.compile can guard on one, but cannot read a ContextVar


def prepare(model: nn.Module) -> None:
    """Replaces the attention implementation of `model` and of all its submodules by span attention."""
    inner = unwrap_model(model)
    modules = [module for module in inner.modules() if _reads_config(module)]
    state_of(inner).config_readers = [weakref.ref(module) for module in modules]
    _replace_in_configs(modules)


def _prepare_again(model: nn.Module) -> None:
    """The same as `prepare`.  A second call does not walk over all modules: PEFT adapters multiply their number."""
    modules = [module() for module in state_of(unwrap_model(model)).config_readers]
    if not modules or None in modules:
        prepare(model)
    else:
        _replace_in_configs(modules)


def _replace_in_configs(modules: Iterable[Any]) -> None:
    for module in modules:
        original = module.config._attn_implementation
        if original not in REPLACEABLE:
            continue
        name = PREFIX + original
        AttentionInterface.register(name, functools.partial(span_attention, original=original))
        AttentionMaskInterface.register(name, functools.partial(mask, original=original))
        # `set_attn_implementation` would check the hardware again, and import flash-attn because of the name.
        module.config._attn_implementation_internal = name


def is_prepared(model: nn.Module) -> bool:
    """Whether `model` uses span attention.  A model that is not prepared would ignore the spans of a batch."""
    return str(attention_implementation(model)).startswith(PREFIX)


def configs(model: nn.Module) -> list[Any]:
    """All transformers configurations from which submodules of `model` read their attention implementation."""
    return list({id(m.config): m.config for m in model.modules() if _reads_config(m)}.values())


def _reads_config(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation")


@contextmanager
def without_masks(model: nn.Module) -> Iterator[None]:
    """Inside this context `model` builds no attention masks, because spans replace them.  Prepares the model first."""
    global _masks_off
    _prepare_again(model)  # every time: somebody may have set another implementation since
    if not is_prepared(model):
        name = attention_implementation(model)
        raise ModelError(
            f"{type(unwrap_model(model)).__name__} has the attention implementation {name!r}, which ignores the "
            f"keyword {SPANS!r}. Use one of {', '.join(REPLACEABLE)}, or layout='padded'"
        )
    before, _masks_off = _masks_off, True
    try:
        yield
    finally:
        _masks_off = before


def mask(*args: Any, original: str, **kwargs: Any) -> Any:
    """The mask for the replaced implementation; None inside `without_masks`."""
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
    """The function that a layer calls: [1, heads, S, d] queries, keys and values in, [1, S, heads, d] out."""
    spans = kwargs.pop(SPANS, None)
    if spans is None:
        if _masks_off:
            raise ModelError(
                f"{type(module).__name__} did not get the keyword {SPANS!r}, although its model was called with it: "
                "some layer does not pass keywords on. Use layout='padded'"
            )
        return _original_function(module, original)(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and _masks_off:
        raise ModelError(f"{type(module).__name__} makes an attention mask of its own: use layout='padded'")
    return attend(query, key, value, spans, implementation=original, **_options(module, kwargs)), None


# Lengths differ in every batch.  One graph break per layer is cheaper than compiling for each length.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
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

    1. On a GPU, one call of a variable-length kernel computes all spans (`_attend_varlen`).  Without such a kernel:
    2. Split queries, keys and values into spans.
    3. For each span, put the keys and values of its context before its own.
    4. Cut the span's queries into blocks.  A block of later queries needs more keys than a block of earlier ones:

           keys        context | span
           block 1     xxxxxxx   xx
           block 2     xxxxxxx   xxxx        each block drops the keys behind its last query,
           block 3     xxxxxxx   xxxxxx      and with a window those before its first query's window

    5. Run ordinary attention on each block, and join the results.

    Args:
        query: [1, Hq, S, d].
        key: [1, Hkv, S, d]; Hq is a multiple of Hkv.  Keys are copied to Hq heads only for torch < 2.12's varlen_attn.
        value: [1, Hkv, S, dv].
        spans: cover the S tokens.
        scale: multiplies the scores; default d ** -0.5.
        dropout: probability of dropping an attention weight.
        window: each token sees itself and the `window` - 1 positions before it; None for all.
        softcap: c of c * tanh(scores / c).
        sinks: [Hq] extra scores that take part in the softmax and contribute nothing.
        implementation: the one that was replaced. Of flash_attention_2, 3 and 4 the function is called here too.

    Returns:
        [1, S, Hq, dv], contiguous.
    """
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError(
            f"queries have the shape {tuple(query.shape)} and keys {tuple(key.shape)}, but this layout needs one row "
            "with as many keys as queries. Key-value caches and virtual tokens need layout='padded'"
        )
    # 1. One call for all spans.
    options = _VarlenOptions(scale=scale, dropout=dropout, window=window, softcap=softcap)
    if sinks is None and (varlen := _varlen(query, key, value, options, implementation)):
        return _attend_varlen(varlen, query, key, value, spans)
    # 2. Split, not slice: the gradient of each slice would be a full tensor of zeros, filled in and added.
    fused = softcap is None and sinks is None
    lengths = [span.length for span in spans.spans]
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    span_at = {span.start: number for number, span in enumerate(spans.spans)}
    outputs = []
    for number, span in enumerate(spans.spans):
        # 3. Keys and values of the context, then those of the span.
        context, context_span = _visible_context(span, window), span_at[span.context_start]
        span_keys = _with_context(keys[number], keys[context_span], context)
        span_values = _with_context(values[number], values[context_span], context)
        # 4. Blocks of queries.  The first query of a block belongs to key number `start`.
        start = span_keys.shape[2] - span.length
        for block in torch.split(queries[number], _block_size(span.length, span_keys, window, fused), dim=2):
            stop = start + block.shape[2]
            first_key = 0 if window is None else max(0, start - window + 1)
            block_keys, block_values = (_slice_keys(x, first_key, stop) for x in (span_keys, span_values))
            # 5. Ordinary attention.
            bias = _bias(spans, start - first_key, block, window)
            if fused:
                output = F.scaled_dot_product_attention(
                    block,
                    block_keys,
                    block_values,
                    attn_mask=bias,
                    dropout_p=dropout,
                    is_causal=bias is None,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            else:
                output = _unfused_attention(block, block_keys, block_values, bias, scale, dropout, softcap, sinks)
            outputs.append(output.transpose(1, 2))
            start = stop
    return torch.cat(outputs, dim=1)


def _options(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `attend`, from those that transformers' layers give to their attention function."""
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


def _original_function(module: nn.Module, original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if original == "eager":
        # Each model file defines its own, always under this name.  FSDP2 makes a subclass that lives in another file.
        files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
        found = next(f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward"))
    else:
        found = ALL_ATTENTION_FUNCTIONS[original]
    return cast(Callable[..., tuple[Tensor, Tensor | None]], found)


def _visible_context(span: Span, window: int | None) -> slice | None:
    """The part of the context that the span's first token sees.  Later tokens never see more of it."""
    length = span.context_length if window is None else min(span.context_length, window - 1)
    return slice(span.context_length - length, span.context_length) if length else None


def _with_context(own: Tensor, of_context_span: Tensor, context: slice | None) -> Tensor:
    return own if context is None else torch.cat([of_context_span[:, :, context], own], dim=2)


def _slice_keys(keys: Tensor, start: int, stop: int) -> Tensor:
    """Keys `start` to `stop`.  If these are all keys, the tensor itself: the gradient of a slice is a copy."""
    return keys if stop - start == keys.shape[2] else keys[:, :, start:stop]


def _block_size(length: int, keys: Tensor, window: int | None, fused: bool) -> int:
    """Queries per block.  A block computes scores for all keys that any of its queries sees: small blocks waste less.

    torch's CPU kernel computes causal scores in blocks of 512 keys, which is up to twice as many as needed.
    """
    if keys.device.type == "cpu" and keys.shape[2] <= 1024:
        return 128
    return length if fused and window is None else 512


def _bias(spans: Spans, before: int, block: Tensor, window: int | None) -> Tensor | None:
    """[n, before + n], added to the scores of n queries behind `before` keys: -inf where a query must not see a key.

    None if plain causal attention does the same.  The dtype is that of the queries, because
    scaled_dot_product_attention would convert a boolean mask again in every layer.
    """
    length = block.shape[2]
    if not before and (window is None or length <= window):
        return None

    def make() -> Tensor:
        distance = (
            torch.arange(before, before + length, device=block.device)[:, None]
            - torch.arange(before + length, device=block.device)[None, :]
        )
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=block.dtype, device=block.device).masked_fill_(hidden, float("-inf"))

    return spans.derived((before, length, window, block.dtype, block.device), make)


def _unfused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in plain operations, for the options that fused functions lack: soft-cap and sinks.  fp32 softmax."""
    heads, groups = query.shape[1], key.shape[1]
    grouped = query.reshape(query.shape[0], groups, heads // groups, *query.shape[2:])
    scores = grouped @ key[:, :, None].transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is None:  # as many keys as queries
        n = scores.shape[-1]
        bias = torch.full((n, n), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores = scores + bias
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, groups, heads // groups, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return (F.dropout(weights, dropout) @ value[:, :, None]).flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class _VarlenOptions:
    """The arguments of a variable-length function that are neither tensors nor lengths."""

    scale: float | None
    dropout: float
    window: int | None
    softcap: float | None


def _attend_varlen(function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """All spans in one call of `function`.  Each span is one of its sequences, with more keys than queries.

    1. Queries stay as they are: span follows span.
    2. Keys and values are gathered: for each span its context, then its own.  A shared prompt is copied.

           tokens      P0 P1 P2 C3 C4 | R5 R6
           queries     P0 P1 P2 C3 C4 | R5 R6               offsets 0 5 7
           keys        P0 P1 P2 C3 C4 | P0 P1 P2 R5 R6      offsets 0 5 10

    3. `function` aligns the queries of a sequence with the last of its keys, so causal attention hides the right ones.
    """
    offsets = spans.derived(("offsets", query.device), lambda: _offsets(spans, query.device))
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if offsets.gathered_keys is not None:
        # At most two spans use a key, so the sum of its gradients does not depend on their order.
        key, value = (x.index_select(0, offsets.gathered_keys) for x in (key, value))
    out = function(query, key, value, offsets.queries, offsets.keys, offsets.longest_query, offsets.longest_key)
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # flash-attn 4 returns its normalizers as well
    return attended[None]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Offsets:
    """The spans of a batch as arguments of variable-length functions."""

    queries: Tensor
    """int32 [spans + 1]: cumulative lengths of the spans."""
    keys: Tensor
    """int32 [spans + 1]: cumulative lengths of context and span together."""
    gathered_keys: Tensor | None
    """int64 [keys[-1]]: the position of each key in the batch; None if no span has a context."""
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
        gathered_keys=torch.cat(pieces).to(device) if queries != keys else None,
        longest_query=max(queries),
        longest_key=max(keys),
    )


Varlen = Callable[..., Any]
"""(queries [T, Hq, d], keys, values, two cumulative lengths, two longest lengths) -> [T, Hq, d], and perhaps more."""


def _varlen(query: Tensor, key: Tensor, value: Tensor, options: _VarlenOptions, implementation: str) -> Varlen | None:
    """The variable-length attention for these tensors, causal and with `options`; None without one.

    The user's own choice comes first, then torch's, then flash-attn's.
    """
    width, grouped = query.shape[-1], query.shape[1] != key.shape[1]
    if not _runs_flash_attention(query.device) or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if width != value.shape[-1] or width > 256 or width % 8:
        return None
    chosen = None
    # The gradient of flash-attn 4's soft-cap is untried: models with one take another function.
    if implementation.startswith("flash_attention") and (implementation[-1] != "4" or options.softcap is None):
        (_, chosen, *_), _ = lazy_import_flash_attention(implementation)
    own = _import("torch.nn.attention.varlen", "varlen_attn")
    same_heads = torch_varlen(own, width, options, grouped=False)
    return (
        flash_attn_varlen(chosen, options)
        or torch_varlen(own, width, options, grouped=grouped)
        or flash_attn_varlen(_import("flash_attn", "flash_attn_varlen_func"), options)
        or (same_heads and functools.partial(_with_repeated_heads, same_heads))
    )


def _runs_flash_attention(device: torch.device) -> bool:
    """NVIDIA's GPUs since Ampere, and AMD's."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def torch_varlen(function: Varlen | None, width: int, options: _VarlenOptions, *, grouped: bool) -> Varlen | None:
    """`torch.nn.attention.varlen.varlen_attn` with `options`; None where its version lacks one of them.

    torch 2.10 has `is_causal` alone, 2.11 `scale` and `window_size` in its place, 2.12 `enable_gqa` as well.
    """
    if function is None or options.dropout or options.softcap is not None:
        return None
    keywords: dict[str, Any] = {}
    if options.window is None and "is_causal" in _parameters(function):
        keywords["is_causal"] = True
    else:
        keywords["window_size"] = (-1 if options.window is None else options.window - 1, 0)
    if options.scale not in (None, width**-0.5):
        keywords["scale"] = options.scale
    if grouped:
        keywords["enable_gqa"] = True
    return _with_keywords(function, keywords)


def flash_attn_varlen(function: Varlen | None, options: _VarlenOptions) -> Varlen | None:
    """flash-attn's `flash_attn_varlen_func` with `options`; None where its version lacks one of them.

    All versions since 2.1 align queries and keys of different lengths at their ends.
    """
    if function is None or (options.dropout and options.softcap is not None):
        return None
    keywords: dict[str, Any] = {"causal": True, "softmax_scale": options.scale}
    if options.window is not None:
        keywords["window_size"] = (options.window - 1, 0)
    if options.dropout:
        keywords["dropout_p"] = options.dropout
    if options.softcap is not None:
        keywords["softcap"] = options.softcap
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
