"""Which models may run in the layouts *packed* and *shared*: an allow-list by the kind of every layer.

One row holds many sequences there, so nothing but attention may carry anything from token to token, and all attention
must go through the function that `attention.py` registers.  `unsupported` looks for the first thing that breaks this
and says it in words.  What it cannot see (an attention class that ignores a keyword, say) is caught by the check of
the first batch, `orpo_plugins/layout_check.py`.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from orpo_plugins.head import unwrap_model
from orpo_plugins.integrations.attention import NOT_UNDERSTOOD, PREFIX, REPLACEABLE, configs

LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
"""Values of a configuration's `layer_types` whose tokens meet in attention alone."""
_CARRIES_STATE = re.compile(
    r"mamba|ssm|recurrent|rglru|rwkv|xlstm|mlstm|slstm|deltanet|linearattention|lightningattention|shortconv|convolution"
    r"|conv1d$|retention|kda|hyena",
    re.IGNORECASE,
)
_POINTWISE = {"transformers.pytorch_utils.Conv1D"}
"""Named like something that mixes tokens, yet a linear layer (GPT-2)."""


def unsupported(model: nn.Module) -> str | None:
    """Why `model` must not run in a layout of one row, in words; None where it can."""
    return next((reason for reason in _reasons(model, unwrap_model(model)) if reason), None)


def _reasons(model: nn.Module, inner: nn.Module) -> Iterator[str | None]:
    """Reasons or None, cheap and general ones first; later ones may rely on earlier ones."""
    yield _adapter(model)
    yield _architecture(inner)
    yield _implementation(inner)
    yield _layer_types(inner)
    yield from (_module(name, module) for name, module in inner.named_modules())
    yield _attention_classes(inner)


def _adapter(model: nn.Module) -> str | None:
    for module in model.modules():
        for config in (getattr(module, "peft_config", None) or {}).values():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
                return f"the {_plain(config.peft_type)} adapter puts virtual tokens before every sequence"
            if getattr(config, "alora_invocation_tokens", None):
                return "an activated LoRA looks for its invocation tokens once per row"
        if hasattr(module, "peft_config"):
            return None
    return None


def _architecture(inner: nn.Module) -> str | None:
    from transformers import PreTrainedModel

    if not isinstance(inner, PreTrainedModel):
        return f"{type(inner).__name__} is no transformers model, whose attention function could be replaced"
    config = inner.config
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(inner).__name__} is an encoder-decoder model"
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "it attends in both directions"
    if getattr(text, "alibi", False) or getattr(text, "use_alibi", False):
        return "its ALiBi biases come from the distance of rows, not from position_ids"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} takes no position_ids"
    return None


def _implementation(inner: nn.Module) -> str | None:
    for config in configs(inner):
        name = config._attn_implementation
        original = str(name).removeprefix(PREFIX)
        if name is not None and original not in REPLACEABLE:
            return (
                f"its attention implementation {original!r} may mean something else than softmax attention; "
                f"known are {', '.join(REPLACEABLE)}"
            )
    return None


def _layer_types(inner: nn.Module) -> str | None:
    config = _text_config(inner)
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in LAYER_TYPES:
            return f"its {str(kind).replace('_', ' ')} layers carry more than the sequence at hand from token to token"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked by absolute position"
    return None


def _module(name: str, module: nn.Module) -> str | None:
    """What a single module does that one row of many sequences would break."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__name__}" in _POINTWISE:
        return None
    if isinstance(module, nn.RNNBase | nn.modules.conv._ConvNd) or _CARRIES_STATE.search(kind.__name__):
        if _in_encoder_of_other_inputs(name):
            return None
        return f"{name} ({kind.__name__}) carries state from token to token"
    return None


def _attention_classes(inner: nn.Module) -> str | None:
    """Every decoder layer needs attention that goes through the interface, and no other."""
    layers = decoder_layers(inner)
    if not layers:
        return f"{type(inner).__name__} has no list of decoder layers"
    for index, layer in enumerate(layers):
        found = [m for m in layer.modules() if _looks_like_attention(m)]
        if not any(_calls_interface(m) for m in found):
            kind = f"{type(found[0]).__name__} does" if found else f"{type(layer).__name__} has no attention that does"
            return f"{kind} not go through transformers' AttentionInterface (layer {index})"
        for module in found:
            if _calls_interface(module) and (reason := _passes_on(module)):
                return reason
    return None


def decoder_layers(inner: nn.Module) -> list[nn.Module]:
    """The longest list of modules that the text decoder holds: its layers."""
    lists = [m for n, m in inner.named_modules() if isinstance(m, nn.ModuleList) and not _in_encoder_of_other_inputs(n)]
    # Experts are lists too, but inside a layer; the outermost list comes first among equals of `named_modules`.
    outer = [m for m in lists if not any(m is not o and any(m is x for x in o.modules()) for o in lists)]
    return list(max(outer, key=len, default=[]))


def _text_config(inner: nn.Module) -> Any:
    config: Any = inner.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _in_encoder_of_other_inputs(name: str) -> bool:
    """Towers for images and sound, which text alone never enters."""
    return any(part in name for part in ("vision", "visual", "audio", "image", "speech", "vqmodel"))


def _looks_like_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() and bool(_source(type(module)))


def _calls_interface(module: nn.Module) -> bool:
    return "attention_interface(" in _source(type(module))


def _passes_on(module: nn.Module) -> str | None:
    """Why an attention class that calls the interface cannot be understood."""
    source, name = _source(type(module)), type(module).__name__
    call = source[source.index("attention_interface(") :]
    if "**" not in call:
        return f"{name} does not pass keyword arguments on to its attention function"
    for keyword in NOT_UNDERSTOOD:
        if re.search(rf"\b{keyword}\s*=", call):
            return f"{name} gives its attention function {keyword!r}, which no span attention here computes"
    return None


def _source(kind: type[nn.Module]) -> str:
    """The source of a class's forward as it is now (a patched one has another), or nothing."""
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value)).lower().replace("_", " ")


def _eager_function(module: nn.Module) -> Any:
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
