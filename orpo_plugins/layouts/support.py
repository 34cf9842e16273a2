"""Which models may run in the layouts *packed* and *shared*: an allow-list by the kind of every layer.

In these layouts one row holds many sequences.  So a model must meet two conditions:

- nothing but attention carries information from token to token;
- all attention goes through the function that `attention.py` registers.

`unsupported` returns the first reason against a model.  It reads configurations and the source of forward methods.  It
cannot see everything, for example an attention class that ignores a keyword.  The check of the first batch
(`layouts/check.py`) finds the rest.
"""

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, cast

from torch import nn

from orpo_plugins.layouts.attention import NOT_UNDERSTOOD, PREFIX, REPLACEABLE, configs
from orpo_plugins.models.head import _is_encoder_only, text_config_of, unwrap_model

FAMILIES = {
    "blt": "it joins neighbouring bytes to patches",
    "doge": "it makes attention masks from its values",
    "xlnet": "it has no causal order of its own",
}
"""Model types with a reason that no layer shows."""
LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
"""The values of `layer_types` in a configuration that stand for softmax attention."""
_CARRIES_STATE = re.compile(
    r"Mamba|SSM|Recurrent|RGLRU|R[Ww][Kk][Vv]|xLSTM|mLSTM|sLSTM|DeltaNet|Linear_?Attention|LightningAttention|ShortConv"
    r"|Convolution|Conv1[dD]$|Retention|KDA|KimiDelta|Hyena"
)
"""Class names of layers that carry information from token to token without attention."""
_LORA_KERNELS = "axolotl.monkeypatch.lora_kernels"
_POINTWISE = {"transformers.pytorch_utils.Conv1D"}
"""Classes with the name of a convolution that are linear layers (GPT-2)."""


def unsupported(model: nn.Module) -> str | None:
    """The reason why `model` must not run in a layout with one row; None if it may."""
    return next((reason for reason in _reasons(model, unwrap_model(model)) if reason), None)


def _reasons(model: nn.Module, inner: nn.Module) -> Iterator[str | None]:
    """A reason or None from each check.  Cheap and general checks come first; later ones rely on earlier ones."""
    yield _adapter(model)
    yield _architecture(inner)
    yield _implementation(inner)
    yield unsupported_layer_types(text_config_of(inner))
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
        return f"{type(inner).__name__} is no transformers model, so its attention function cannot be replaced"
    config = inner.config
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(inner).__name__} is an encoder-decoder model"
    if _is_encoder_only(inner):
        return f"{type(inner).__name__} attends in both directions unless its configuration says is_decoder"
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    text = text_config_of(inner)
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "it attends in both directions"
    if getattr(text, "alibi", False) or getattr(text, "use_alibi", False):
        return "its ALiBi biases are computed from distances in the row, not from position_ids"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} takes no position_ids"
    return None


def _implementation(inner: nn.Module) -> str | None:
    for config in configs(inner):
        name = config._attn_implementation
        original = str(name).removeprefix(PREFIX)
        if name is not None and original not in REPLACEABLE:
            return (
                f"its attention implementation {original!r} may not compute softmax attention; "
                f"known are {', '.join(REPLACEABLE)}"
            )
    softcap = getattr(text_config_of(inner), "attn_logit_softcapping", None)
    if softcap and str(text_config_of(inner)._attn_implementation).removeprefix(PREFIX) == "sdpa":
        return "its attention is soft-capped, which 'sdpa' leaves out: load it with attn_implementation='eager'"
    return None


def unsupported_layer_types(config: Any) -> str | None:
    """The reason against the layers that a text configuration names; None if there is none."""
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in LAYER_TYPES:
            words = str(kind).replace("_", " ")
            return f"its {words} layers are not softmax attention over their sequence"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked by absolute position"
    return None


def _module(name: str, module: nn.Module) -> str | None:
    """The reason against a single module: it carries state from token to token, by its class or by its name."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__name__}" in _POINTWISE or hasattr(module, "get_input_embeddings"):
        return None  # modules with embeddings are models: "Mamba" in their name is that of the family
    if isinstance(module, nn.RNNBase | nn.modules.conv._ConvNd) or _CARRIES_STATE.search(kind.__name__):
        if _in_encoder_of_other_inputs(name):
            return None
        return f"{name} ({kind.__name__}) carries state from token to token"
    return None


def _attention_classes(inner: nn.Module) -> str | None:
    """Checks that each decoder layer calls the attention interface and passes all keyword arguments on to it."""
    layers = decoder_layers(inner)
    if not layers:
        return f"{type(inner).__name__} has no list of decoder layers"
    window = _has_window(text_config_of(inner))
    for index, layer in enumerate(map(_without_wrappers, layers)):
        if reason := next((r for m in layer.modules() if (r := _replaced_forward(layer, m))), None):
            return f"{reason} (layer {index})"
        attentions = [m for m in layer.modules() if _interface_call(_nodes(m))]
        if not attentions:
            name = next((type(m).__name__ for m in layer.modules() if "Attention" in type(m).__name__), None)
            name = name or type(layer).__name__
            return f"{name} does not go through transformers' AttentionInterface (layer {index})"
        if layer not in attentions and not any(_spreads_keywords(call) for call in _calls(_nodes(layer))):
            return f"{type(layer).__name__} does not pass keyword arguments on to its attention"
        for attention in attentions:
            if getattr(attention, "is_causal", True) is False:
                return f"{type(attention).__name__} attends in both directions"
            if reason := _not_understood(attention, window):
                return reason
    return None


def _without_wrappers(layer: nn.Module) -> nn.Module:
    """The decoder layer inside torch's wrappers for compilation, checkpointing and sharding."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        inner = layer._modules.get(name)
        if inner is not None:
            return _without_wrappers(inner)
    return layer


def _replaced_forward(layer: nn.Module, module: nn.Module) -> str | None:
    """The reason against a forward method inside `layer` that somebody has replaced, on the class or on the module."""
    name, own = type(module).__name__, vars(module).get("forward")
    if (module is layer or "Attention" in name) and not _nodes(module):
        axolotl = getattr(_forward_of(module), "__module__", None) == _LORA_KERNELS
        options = ": set Axolotl's lora_qkv_kernel and lora_o_kernel to false" if axolotl else ""
        return f"the source of {name}.forward cannot be read (probably replaced at run time){options}"
    if own is not None and _interface_call(_source_of(type(module).forward)) and not _interface_call(_nodes(module)):
        return f"{name}.forward was replaced by one that does not go through transformers' AttentionInterface"
    return None


def _has_window(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (not types or "sliding_attention" in types)


def _not_understood(attention: nn.Module, window: bool) -> str | None:
    """The reason against attention that calls the interface, but with keywords that span attention cannot replace."""
    name, call = type(attention).__name__, _interface_call(_nodes(attention))
    assert call is not None
    keywords = {keyword.arg for keyword in call.keywords}
    if not _spreads_keywords(call):
        return f"{name} does not pass keyword arguments on to its attention function"
    if window and "sliding_window" not in keywords:
        return f"{name} has a sliding window only in its mask and does not pass it to its attention function"
    if unknown := next((keyword for keyword in NOT_UNDERSTOOD if keyword in keywords), None):
        return f"{name} gives its attention function {unknown!r}, which changes its scores"
    return _depends_on_implementation(attention)


def _depends_on_implementation(attention: nn.Module) -> str | None:
    """The reason against attention that compares the name of its implementation: the name changes when we replace it.

    GPT-2 compares it as well, but does something with it only if its flag `reorder_and_upcast_attn` is set.
    """
    if not any(_compares_implementation(node) for node in _nodes(attention)):
        return None
    name = type(attention).__name__
    if not hasattr(attention, "reorder_and_upcast_attn"):
        return f"{name} depends on the name of its attention implementation, which this layout replaces"
    implementation = str(getattr(attention.config, "_attn_implementation", None)).removeprefix(PREFIX)
    if not attention.reorder_and_upcast_attn or implementation != "eager":
        return None
    return f"{name} has reorder_and_upcast_attn, whose fp32 scores no attention function computes"


def _compares_implementation(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and any(
        isinstance(part, ast.Attribute) and part.attr == "_attn_implementation" for part in ast.walk(node)
    )


def decoder_layers(inner: nn.Module) -> list[nn.Module]:
    """The layers of the text decoder: the longest list of modules that is in no other list."""
    lists = [m for n, m in inner.named_modules() if isinstance(m, nn.ModuleList) and not _in_encoder_of_other_inputs(n)]
    # The experts of a layer are a list too, but inside the list of layers.
    outer = [m for m in lists if not any(m is not o and any(m is x for x in o.modules()) for o in lists)]
    return list(max(outer, key=len, default=[]))


def _in_encoder_of_other_inputs(name: str) -> bool:
    """Whether a module belongs to an encoder for images or sound, which text never enters."""
    return any(part in name for part in ("vision", "visual", "audio", "image", "speech", "vqmodel", "projector"))


def _calls(nodes: Sequence[ast.AST]) -> Iterator[ast.Call]:
    return (node for node in nodes if isinstance(node, ast.Call))


def _interface_call(nodes: Sequence[ast.AST]) -> ast.Call | None:
    """The call of `attention_interface`.  In transformers, all attention that can be replaced calls this name."""
    return next((c for c in _calls(nodes) if isinstance(c.func, ast.Name) and c.func.id == "attention_interface"), None)


def _nodes(module: nn.Module) -> Sequence[ast.AST]:
    """The syntax tree of the forward that a module runs now; empty if its source cannot be read."""
    function = _forward_of(module)
    return _source_of(function) or _rewritten_by_axolotl(type(module), function)


def _forward_of(module: Any) -> Any:
    """The function that a call of `module` runs: an attribute of the module, or else the method of its class."""
    if hasattr(module, "_hf_hook"):  # Accelerate's hook calls the forward that it has replaced
        return module._old_forward
    return vars(module).get("forward", type(module).forward)


def _source_of(function: Any) -> Sequence[ast.AST]:
    """The syntax tree of a function.  For a decorated function, that of the function inside."""
    function = getattr(function, "__func__", function)
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        # A real decorator has the wrapped function in its closure.  A replacement that only copied its name has not.
        if not any(cell.cell_contents is wrapped for cell in getattr(function, "__closure__", None) or ()):
            return ()
        function = getattr(wrapped, "__func__", wrapped)
    return _parsed(getattr(function, "__code__", None))


@functools.cache  # by code and not by function: a function may keep a module alive
def _parsed(code: CodeType | None) -> Sequence[ast.AST]:
    if code is None:
        return ()
    try:
        return tuple(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code)))))
    except (OSError, SyntaxError):  # code made by exec, or a lambda inside an expression
        return ()


def _rewritten_by_axolotl(kind: Any, function: Any) -> Sequence[ast.AST]:
    """The syntax tree of a forward that Axolotl's LoRA kernels have rewritten and compiled from a string.

    This repeats the rewriting.  The result counts only if it compiles to exactly the code that runs.
    """
    original, kernels = getattr(kind, "_original_forward", None), cast(Any, sys.modules.get(_LORA_KERNELS))
    if not isinstance(original, str) or getattr(function, "__module__", None) != _LORA_KERNELS:
        return ()
    try:
        source = textwrap.dedent(original)
        before, after = next(patch for patch in kernels.QKV_PATCHES if patch[0] in source)
        source = source.replace(before, after).replace(kernels.ORIGINAL_O_CODE, kernels.PATCHED_O_CODE)
        source = source.replace("def forward(", f"def {function.__name__}(", 1)
        code = next(c for c in compile(source, "<string>", "exec").co_consts if isinstance(c, CodeType))
        return tuple(ast.walk(ast.parse(source))) if code == function.__code__ else ()
    except (AttributeError, StopIteration, SyntaxError, TypeError, ValueError):  # another version of Axolotl
        return ()


def _spreads_keywords(call: ast.Call) -> bool:
    return any(keyword.arg is None for keyword in call.keywords)


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value)).lower().replace("_", " ")
