"""The model's output head, and how a kernel takes its place for one forward pass.

1. While the model's forward runs, `lm_head.forward` is replaced (`replaced_forward`).
2. The replacement gets all hidden states and runs a kernel on those that predict a token.
3. It returns the loss where the model expects logits.

This needs no code for any single model.  And since it happens inside the forward of wrappers, sharded weights (FSDP2,
ZeRO-3) are whole at that moment.

Some models scale or softcap their logits after the head.  They would do so to the loss instead.  So each model runs
once with known numbers in place of its logits (`head_options`), which shows what it does to them.  The kernel then does
the same to the real logits.  A model that does anything else to its logits is an error.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from orpo_plugins.errors import ModelError
from orpo_plugins.hooks.types import HeadOptions
from orpo_plugins.models.state import state_of

_WRAPPER_ATTRIBUTES = ("_orig_mod", "module")
_REFERENCE_WAY_OUT = "Use kernel='reference', which works on the model's own logits"


def unwrap_model(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DDP, FSDP1, DeepSpeed and PEFT wrappers."""
    *_, inner = wrappers(model)
    return inner


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself, the model inside it, and so on down to the transformers model."""
    yield model
    if hasattr(model, "get_base_model"):
        yield from wrappers(cast(Any, model).get_base_model())
        return
    for name in _WRAPPER_ATTRIBUTES:
        inner = model._modules.get(name)
        # Looked up on the type, because wrappers pass on the attributes of the model inside.
        if inner is not None and not hasattr(type(model), "get_output_embeddings"):
            yield from wrappers(inner)
            return


def config_of(model: nn.Module) -> Any:
    """The transformers configuration of the innermost model, or None."""
    return getattr(unwrap_model(model), "config", None)


def text_config_of(model: nn.Module) -> Any:
    """The configuration of the language model, for models that also take images or sound; else `config_of`."""
    config = config_of(model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_implementation(model: nn.Module) -> str | None:
    """The name of the attention implementation that the text decoder has now; None where it has none."""
    return getattr(text_config_of(model), "_attn_implementation", None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads prompts with a separate encoder, as T5 and BART do."""
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def output_head(model: nn.Module) -> nn.Module:
    """The module that computes logits from hidden states; PEFT's trained copy of it where that one is active.

    Raises `ModelError` for a model without a decoder, or without a head.
    """
    inner = unwrap_model(model)
    head = cast(Any, inner).get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or _is_encoder_only(inner):
        raise ModelError(
            f"{type(inner).__name__} is not a causal language model with an output head. ORPO scores answers "
            "token by token: load the checkpoint with AutoModelForCausalLM, from a decoder architecture, or with "
            "AutoModelForSeq2SeqLM"
        )
    return _in_use(head)


def _in_use(head: Any) -> nn.Module:
    """The module itself, or the one that runs inside of PEFT's wrapper for `modules_to_save`.

    The wrapper's own forward must not be replaced: under ZeRO-3 the copy's weights are whole only during its call.
    """
    if not (hasattr(head, "modules_to_save") and hasattr(head, "active_adapters")):
        return cast(nn.Module, head)
    adapters = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.modules_to_save]
    return cast(nn.Module, head.modules_to_save[adapters[0]] if adapters else head.original_module)


def _is_encoder_only(model: nn.Module) -> bool:
    """Whether tokens attend in both directions, as in families of masked LMs unless their config has `is_decoder`."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith("ForMaskedLM"):
        return True
    if is_encoder_decoder(model):
        return False
    return bool(getattr(config, "is_decoder", None) is False and name in _bidirectional_heads())


def _bidirectional_heads() -> frozenset[str]:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    # Families with both kinds of head have one body for both.  Its attention mask is causal only with `is_decoder`.
    both = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    return frozenset(str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]) for family in both)


def head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) of the head, as its forward would use them now.

    Raises `ModelError` for a head that computes anything else than hidden @ weight.T + bias.
    """
    if hasattr(head, "base_layer") or hasattr(head, "lora_A"):
        raise ModelError(
            f"lm_head carries an adapter ({type(head).__name__}), whose weights a fused head would leave without a "
            "gradient. Train the head whole with modules_to_save=['lm_head'] and leave it out of target_modules, or "
            "use kernel='reference'"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(
            f"lm_head is a {type(head).__name__} whose weight is {_describe(weight)}, not a floating-point matrix. "
            f"Keep lm_head out of quantization (llm_int8_skip_modules=['lm_head']). {_REFERENCE_WAY_OUT}"
        )
    if not isinstance(head, nn.Linear):
        raise ModelError(f"lm_head is a {type(head).__name__}, not a torch.nn.Linear. {_REFERENCE_WAY_OUT}")
    if weight.requires_grad and torch.is_grad_enabled() and _is_offloaded(head):
        raise ModelError(
            "lm_head is trainable and offloaded, and Accelerate throws the gradients of offloaded weights away. Keep "
            "lm_head on a device (device_map), or freeze it"
        )
    if weight.device.type == "meta":
        raise ModelError(f"lm_head is offloaded (device 'meta') during the forward. {_REFERENCE_WAY_OUT}")
    return weight, head.bias


def _is_offloaded(head: Any) -> bool:
    hook = getattr(head, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


def _describe(weight: Any) -> str:
    return f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(type(weight).__name__)


class _StandIn:
    """What replaces the `forward` of a head.

    There is one object per head, because torch.compile would compile again for another object.  It is never traced:
    that would make no kernel faster, and inductor rejects some of its products (torch 2.13).
    """

    def __init__(self) -> None:
        self.forward: Callable[..., Tensor] | None = None
        # Not as a decorator, which would load the compiler whenever this module is imported.
        self.untraced: Callable[..., Tensor] = cast(Any, torch.compiler).disable(self.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.forward is not None
        return self.forward(*args, **kwargs)


# Not in `ModelState`: it belongs to the head, which an adapter may replace.
_stand_ins: "weakref.WeakKeyDictionary[nn.Module, _StandIn]" = weakref.WeakKeyDictionary()


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replaces `head.forward` inside the block.  The head's hooks still run."""
    # Accelerate's hook for `device_map` is installed as `forward`.  It moves hidden states to the head's device, brings
    # back offloaded weights, and calls `_old_forward`.
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    previous = head.__dict__.get(name)
    stand_in = _stand_ins.get(head)
    if stand_in is None:
        stand_in = _stand_ins[head] = _StandIn()
    outer, stand_in.forward = stand_in.forward, forward
    setattr(head, name, stand_in.untraced)
    try:
        yield
    finally:
        stand_in.forward = outer
        if previous is None:
            delattr(head, name)
        else:  # the head had a forward of its own already: of an outer block, or of a hook
            setattr(head, name, previous)


@contextmanager
def final_bias_taken_out(model: nn.Module) -> Iterator[Tensor | None]:
    """Yields the [V] buffer that BART and its relatives add to their logits.  Inside the block they add zero."""
    buffers = unwrap_model(model)._buffers
    bias = buffers.get("final_logits_bias")
    if bias is None:
        yield None
        return
    buffers["final_logits_bias"] = torch.zeros_like(bias[..., :1])
    try:
        yield bias.reshape(-1)
    finally:
        buffers["final_logits_bias"] = bias


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Puts every module into eval mode, and back into its own mode afterwards."""
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts every module into training or eval mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model output, which may be a mapping, a tuple or an object."""
    if isinstance(outputs, Mapping):
        return cast(Tensor, outputs["logits"])
    return cast(Tensor, outputs[0] if isinstance(outputs, tuple) else outputs.logits)


def row_numbers(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a batch with one number per row (PEFT's `task_ids`), cut to its first row."""
    rows = inputs["input_ids"].shape[:1]
    return {key: value[:1] for key, value in inputs.items() if isinstance(value, Tensor) and value.shape == rows}


def head_options(model: nn.Module, input_ids: Tensor, others: Mapping[str, Tensor] | None = None) -> HeadOptions:
    """Scale and soft-cap that the model applies to its logits, found out by one probe per model.

    The probe is a forward pass of two tokens without gradient, in which the head returns known numbers x.  `others` are
    further arguments for one row.

    Raises `ModelError` where the model returns anything else than `scale * x` or `c * tanh(scale * x / c)`.
    """
    state = state_of(unwrap_model(model))
    if state.head_options is None:
        state.head_options = _probe(model, input_ids, others or {})
    return state.head_options


# Powers of two, so that a scale is found without rounding.  2**-10 is in the linear part of every soft-cap in use (30
# and 50), and 2**40 is far in its flat part.
_PROBE = (2.0**-10, 0.0, -1.0, 3.0, 64.0, -300.0, 2.0**40, -(2.0**40))


def _probe(model: nn.Module, input_ids: Tensor, others: Mapping[str, Tensor]) -> HeadOptions:
    head = output_head(model)
    sent: list[Tensor] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        size = head_parameters(head)[0].shape[0]
        pattern = torch.tensor(_PROBE, device=hidden.device).repeat(size // len(_PROBE) + 1)[:size]
        sent.append(pattern.expand(*hidden.shape[:-1], size).clone())
        return sent[-1].clone()

    keep_four_bit_trainable(model)
    tokens = input_ids.reshape(-1)[:2].reshape(1, -1)
    inputs = {**others, "input_ids": tokens, **({"decoder_input_ids": tokens} if is_encoder_decoder(model) else {})}
    eager = torch.compiler.set_stance("force_eager")  # compiling does not pay for one pass
    with torch.no_grad(), eager, evaluating(model), replaced_forward(head, forward), final_bias_taken_out(model):
        received = logits_of(model(**inputs, use_cache=False))
    if len(sent) != 1 or received.shape != sent[0].shape:
        raise ModelError(
            f"{type(unwrap_model(model)).__name__} calls its lm_head {len(sent)} times or reshapes its logits "
            f"({tuple(received.shape)}), so a fused head cannot replace it. {_REFERENCE_WAY_OUT}"
        )
    return _explain(sent[0].double().cpu(), received.double().cpu(), type(unwrap_model(model)).__name__)


def keep_four_bit_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes on a CPU from packing 4-bit weights at the first pass in evaluation mode.

    Packed weights silently pass no gradient on (seen in 0.50, on CPUs with AVX-512).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # reading the state unpacks the weights in place


def _explain(sent: Tensor, received: Tensor, name: str) -> HeadOptions:
    tiny, huge = received.flatten()[0], received.flatten()[_PROBE.index(2.0**40)]
    scale = float(tiny / _PROBE[0])
    capped = float(huge) < 0.5 * scale * 2.0**40
    softcap = float(huge) if capped else None
    expected = scale * sent if softcap is None else softcap * (scale * sent / softcap).tanh()
    # 1e-2, because a model may round logits to bf16; another function differs by far more.
    if not (scale > 0 and torch.allclose(received, expected, rtol=1e-2, atol=1e-6)):
        wrong = int(((received - expected).abs() > 1e-6 + 1e-2 * expected.abs()).flatten().nonzero()[0])
        raise ModelError(
            f"{name} post-processes its logits in an unknown way: {sent.flatten()[wrong]:g} at vocabulary entry "
            f"{wrong % sent.shape[-1]} became {received.flatten()[wrong]:g}, which is neither a scale nor a soft-cap. "
            f"{_REFERENCE_WAY_OUT}"
        )
    return HeadOptions(softcap=softcap, logit_scale=scale)
