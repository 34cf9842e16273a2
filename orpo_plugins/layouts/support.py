"""Which models may run in the layouts *packed* and *shared*: an allow-list by the kind of every layer.

One row holds many sequences there, so nothing but attention may carry anything from token to token, and all attention
must go through the function that `attention.py` registers.  `unsupported` looks for the first thing that breaks this
and says it in words.  What it cannot see (an attention class that ignores a keyword, say) is caught by the check of
the first batch, `orpo_plugins/layouts/check.py`.
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
    "blt": "it joins bytes to patches along the row",
    "doge": "it makes attention masks from its values",
    "xlnet": "it has no causal order of its own",
}
"""What no layer shows, by model type."""
LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
"""Values of a configuration's `layer_types` whose tokens meet in attention alone."""
_CARRIES_STATE = re.compile(
    r"Mamba|SSM|Recurrent|RGLRU|R[Ww][Kk][Vv]|xLSTM|mLSTM|sLSTM|DeltaNet|Linear_?Attention|LightningAttention|ShortConv"
    r"|Convolution|Conv1[dD]$|Retention|KDA|KimiDelta|Hyena"
)
_LORA_KERNELS = "axolotl.monkeypatch.lora_kernels"
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
        return f"{type(inner).__name__} is no transformers model, whose attention function could be replaced"
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
    softcap = getattr(text_config_of(inner), "attn_logit_softcapping", None)
    if softcap and str(text_config_of(inner)._attn_implementation).removeprefix(PREFIX) == "sdpa":
        return "its attention is soft-capped, which 'sdpa' leaves out: load it with attn_implementation='eager'"
    return None


def unsupported_layer_types(config: Any) -> str | None:
    """What a text configuration alone says against its layers."""
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in LAYER_TYPES:
            words = str(kind).replace("_", " ")
            return f"its {words} layers are something else than softmax attention over their sequence"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked by absolute position"
    return None


def _module(name: str, module: nn.Module) -> str | None:
    """What a single module does that one row of many sequences would break."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__name__}" in _POINTWISE or hasattr(module, "get_input_embeddings"):
        return None  # the latter are whole models, named after their family
    if isinstance(module, nn.RNNBase | nn.modules.conv._ConvNd) or _CARRIES_STATE.search(kind.__name__):
        if _in_encoder_of_other_inputs(name):
            return None
        return f"{name} ({kind.__name__}) carries state from token to token"
    return None


def _attention_classes(inner: nn.Module) -> str | None:
    """Every decoder layer needs attention that goes through the interface, and nothing may get lost on the way."""
    layers = decoder_layers(inner)
    if not layers:
        return f"{type(inner).__name__} has no list of decoder layers"
    window = _has_window(text_config_of(inner))
    for index, layer in enumerate(map(_without_wrappers, layers)):
        if reason := next((r for m in layer.modules() if (r := _replaced(layer, m))), None):
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
    """The decoder layer inside what torch puts around it, one layer at a time: compiled, checkpointed, sharded."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        inner = layer._modules.get(name)
        if inner is not None:
            return _without_wrappers(inner)
    return layer


def _replaced(layer: nn.Module, module: nn.Module) -> str | None:
    """What is wrong with a forward inside of `layer` that was replaced at run time, on a class or on one module."""
    name, own = type(module).__name__, vars(module).get("forward")
    if (module is layer or "Attention" in name) and not _nodes(module):
        axolotl = getattr(_forward_of(module), "__module__", None) == _LORA_KERNELS
        options = ": set Axolotl's lora_qkv_kernel and lora_o_kernel to false" if axolotl else ""
        return f"the source of {name}.forward cannot be read, as where something replaced it at run time{options}"
    if own is not None and _interface_call(_source_of(type(module).forward)) and not _interface_call(_nodes(module)):
        return f"{name}.forward was replaced by one that does not go through transformers' AttentionInterface"
    return None


def _has_window(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (not types or "sliding_attention" in types)


def _not_understood(attention: nn.Module, window: bool) -> str | None:
    """Why attention that calls the interface cannot be replaced."""
    name, call = type(attention).__name__, _interface_call(_nodes(attention))
    assert call is not None
    keywords = {keyword.arg for keyword in call.keywords}
    if not _spreads_keywords(call):
        return f"{name} does not pass keyword arguments on to its attention function"
    if window and "sliding_window" not in keywords:
        return f"{name} has a sliding window in its mask alone and does not tell its attention function"
    if unknown := next((keyword for keyword in NOT_UNDERSTOOD if keyword in keywords), None):
        return f"{name} gives its attention function {unknown!r}, which changes its scores"
    return _asks_for_its_implementation(attention)


def _asks_for_its_implementation(attention: nn.Module) -> str | None:
    """Attention that does something else for one implementation would not know that ours stands in front of it."""
    if not any(_compares_implementation(node) for node in _nodes(attention)):
        return None
    name = type(attention).__name__
    if not hasattr(attention, "reorder_and_upcast_attn"):  # GPT-2's flag: without it, nothing comes of the question
        return f"{name} computes something else under one attention implementation, which ours would hide"
    implementation = str(getattr(attention.config, "_attn_implementation", None)).removeprefix(PREFIX)
    if not attention.reorder_and_upcast_attn or implementation != "eager":
        return None
    return f"{name} has reorder_and_upcast_attn, whose fp32 scores no attention function computes"


def _compares_implementation(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and any(
        isinstance(part, ast.Attribute) and part.attr == "_attn_implementation" for part in ast.walk(node)
    )


def decoder_layers(inner: nn.Module) -> list[nn.Module]:
    """The longest list of modules that the text decoder holds: its layers."""
    lists = [m for n, m in inner.named_modules() if isinstance(m, nn.ModuleList) and not _in_encoder_of_other_inputs(n)]
    # Experts are lists too, but inside a layer; the outermost list comes first among equals of `named_modules`.
    outer = [m for m in lists if not any(m is not o and any(m is x for x in o.modules()) for o in lists)]
    return list(max(outer, key=len, default=[]))


def _in_encoder_of_other_inputs(name: str) -> bool:
    """Towers for images and sound, which text alone never enters."""
    return any(part in name for part in ("vision", "visual", "audio", "image", "speech", "vqmodel", "projector"))


def _calls(nodes: Sequence[ast.AST]) -> Iterator[ast.Call]:
    return (node for node in nodes if isinstance(node, ast.Call))


def _interface_call(nodes: Sequence[ast.AST]) -> ast.Call | None:
    """The call of `attention_interface`, as all attention of transformers that can be replaced has it."""
    return next((c for c in _calls(nodes) if isinstance(c.func, ast.Name) and c.func.id == "attention_interface"), None)


def _nodes(module: nn.Module) -> Sequence[ast.AST]:
    """The syntax tree of the forward that a module runs now; nothing where its source cannot be read."""
    function = _forward_of(module)
    return _source_of(function) or _rewritten_by_axolotl(type(module), function)


def _forward_of(module: Any) -> Any:
    """The function that a call of `module` runs: its own one, where one was put on it, or else its class's."""
    if hasattr(module, "_hf_hook"):  # Accelerate's, around a forward that it keeps
        return module._old_forward
    return vars(module).get("forward", type(module).forward)


def _source_of(function: Any) -> Sequence[ast.AST]:
    """The syntax tree of a function, without decorators that call what they wrap."""
    function = getattr(function, "__func__", function)
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        # A decorator that calls what it wraps holds it; a function that only took over its name does not.
        if not any(cell.cell_contents is wrapped for cell in getattr(function, "__closure__", None) or ()):
            return ()
        function = getattr(wrapped, "__func__", wrapped)
    return _parsed(getattr(function, "__code__", None))


@functools.cache  # by code, which keeps no module alive as functions may
def _parsed(code: CodeType | None) -> Sequence[ast.AST]:
    if code is None:
        return ()
    try:
        return tuple(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code)))))
    except (OSError, SyntaxError):  # made by exec; a lambda in the middle of an expression
        return ()


def _rewritten_by_axolotl(kind: Any, function: Any) -> Sequence[ast.AST]:
    """The syntax tree of an attention's forward that Axolotl's LoRA kernels have rewritten and compiled from a string.

    The rewriting is done once more, and believed only where it compiles to the very code that runs.
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
    except (AttributeError, StopIteration, SyntaxError, TypeError, ValueError):  # another version's way
        return ()


def _spreads_keywords(call: ast.Call) -> bool:
    return any(keyword.arg is None for keyword in call.keywords)


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value)).lower().replace("_", " ")
