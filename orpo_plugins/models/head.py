"""The model's output head, intercepted for one forward pass.

While the forward runs, `lm_head.forward` is replaced.  It receives all hidden states, picks the rows that predict
something, runs a kernel, and returns the loss where logits would be.  That works for every causal LM without a
patch per model, and because it happens inside the wrapper's forward, sharded weights (FSDP2, ZeRO-3) are whole then.

What a model does to its logits afterwards (soft-capping, scaling) would be done to the loss instead.  So each model
is asked once, with a probe instead of logits, what it does to them; the kernel is told, and anything that is
neither a scale nor a soft-cap is refused.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from orpo_plugins.errors import ModelError
from orpo_plugins.hooks.types import HeadOptions

_WRAPPER_ATTRIBUTES = ("_orig_mod", "module")
_REFERENCE_WAY_OUT = "Use kernel='reference', which works on the model's own logits"
_transforms: "weakref.WeakKeyDictionary[nn.Module, HeadOptions]" = weakref.WeakKeyDictionary()


def unwrap_model(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DDP, FSDP1, DeepSpeed and PEFT wrappers."""
    *_, inner = wrappers(model)
    return inner


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself, what it wraps, and so on down to the transformers model."""
    yield model
    if hasattr(model, "get_base_model"):
        yield from wrappers(cast(Any, model).get_base_model())
        return
    for name in _WRAPPER_ATTRIBUTES:
        inner = model._modules.get(name)
        # On the type: wrappers pass attributes of what they wrap through.
        if inner is not None and not hasattr(type(model), "get_output_embeddings"):
            yield from wrappers(inner)
            return


def config_of(model: nn.Module) -> Any:
    """The transformers configuration of the innermost model, or None."""
    return getattr(unwrap_model(model), "config", None)


def text_config_of(model: nn.Module) -> Any:
    """That of its language model, where it takes images or sound too."""
    config = config_of(model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_implementation(model: nn.Module) -> str | None:
    """The name of the attention implementation that the text decoder has now; None where it has none."""
    return getattr(text_config_of(model), "_attn_implementation", None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads prompts with an encoder of their own, as T5 and BART do."""
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits from hidden states, PEFT's trained copy of it where that is in use.

    Raises `ModelError` for a model that has no decoder with a head.
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
    """What runs behind PEFT's wrapper of a module in `modules_to_save`, or the module itself.

    The wrapper's forward must not be replaced: under ZeRO-3 the copy's weights are whole only while it is called.
    """
    if not (hasattr(head, "modules_to_save") and hasattr(head, "active_adapters")):
        return cast(nn.Module, head)
    adapters = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.modules_to_save]
    return cast(nn.Module, head.modules_to_save[adapters[0]] if adapters else head.original_module)


def _is_encoder_only(model: nn.Module) -> bool:
    """Masked-LM families look both ways unless their config says `is_decoder`."""
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

    # Families that have both heads share one body, whose attention mask is causal only with `is_decoder`.
    both = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    return frozenset(str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]) for family in both)


def head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) of the head as its forward would use them now.

    Raises `ModelError` for a head whose forward is more than one linear map of these two.
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
    """What stands at a head's `forward` meanwhile.

    One object per head, since torch.compile would compile anew for another one, and never traced: a kernel gains
    nothing from it, and inductor rejects some of its products (torch 2.13).
    """

    def __init__(self) -> None:
        self.forward: Callable[..., Tensor] | None = None
        # Not as a decorator, which would load the compiler for all who import this module.
        self.untraced: Callable[..., Tensor] = cast(Any, torch.compiler).disable(self.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.forward is not None
        return self.forward(*args, **kwargs)


_stand_ins: "weakref.WeakKeyDictionary[nn.Module, _StandIn]" = weakref.WeakKeyDictionary()


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Puts `forward` in place of `head.forward` (hooks around it stay), and takes it out again."""
    # Accelerate's hook for `device_map` stands at `forward`.  It moves hidden states to the head's device, brings back
    # offloaded weights, and calls this one.
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
        else:  # an instance attribute already stood there: a hook, another interception
            setattr(head, name, previous)


@contextmanager
def final_bias_taken_out(model: nn.Module) -> Iterator[Tensor | None]:
    """Yields the [V] buffer that BART's relatives add to what their head returns, and has them add zero instead."""
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
    """Every module in eval mode, and each back in its own mode afterwards."""
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module in training or in eval mode, and each back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model output, whichever way the model returns it."""
    if isinstance(outputs, Mapping):
        return cast(Tensor, outputs["logits"])
    return cast(Tensor, outputs[0] if isinstance(outputs, tuple) else outputs.logits)


def row_numbers(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a batch holds one number a row of (`task_ids` of PEFT), for its first row."""
    rows = inputs["input_ids"].shape[:1]
    return {key: value[:1] for key, value in inputs.items() if isinstance(value, Tensor) and value.shape == rows}


def head_options(model: nn.Module, input_ids: Tensor, others: Mapping[str, Tensor] | None = None) -> HeadOptions:
    """Scale and soft-cap that the model applies to its logits, found out by a probe (once per model).

    One forward pass of two tokens without gradient, in which the head returns known numbers in place of logits;
    `others` are more arguments for one row.

    Raises `ModelError` where what comes back is not `c * tanh(scale * x / c)` or `scale * x` of the probe.
    """
    inner = unwrap_model(model)
    if inner not in _transforms:
        _transforms[inner] = _probe(model, input_ids, others or {})
    return _transforms[inner]


# Powers of two, so that a scale comes back without rounding; 2**-10 lies in the linear part of any soft-cap
# in use (30 and 50) and 2**40 far in its flat part.
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
    eager = torch.compiler.set_stance("force_eager")  # one pass is not worth compiling for
    with torch.no_grad(), eager, evaluating(model), replaced_forward(head, forward), final_bias_taken_out(model):
        received = logits_of(model(**inputs, use_cache=False))
    if len(sent) != 1 or received.shape != sent[0].shape:
        raise ModelError(
            f"{type(unwrap_model(model)).__name__} calls its lm_head {len(sent)} times or reshapes its logits "
            f"({tuple(received.shape)}), so a fused head cannot stand in for it. {_REFERENCE_WAY_OUT}"
        )
    return _explain(sent[0].double().cpu(), received.double().cpu(), type(unwrap_model(model)).__name__)


def keep_four_bit_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes on a CPU from packing 4-bit weights at the first pass in evaluation mode.

    Seen in 0.50, on CPUs with AVX-512: no gradient passes through what it has packed, and nothing says so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # packed already: reading the state undoes it, in place


def _explain(sent: Tensor, received: Tensor, name: str) -> HeadOptions:
    tiny, huge = received.flatten()[0], received.flatten()[_PROBE.index(2.0**40)]
    scale = float(tiny / _PROBE[0])
    capped = float(huge) < 0.5 * scale * 2.0**40
    softcap = float(huge) if capped else None
    expected = scale * sent if softcap is None else softcap * (scale * sent / softcap).tanh()
    # 1e-2 where a model rounds logits to bf16 before or after its own arithmetic; a different function is far off.
    if not (scale > 0 and torch.allclose(received, expected, rtol=1e-2, atol=1e-6)):
        wrong = int(((received - expected).abs() > 1e-6 + 1e-2 * expected.abs()).flatten().nonzero()[0])
        raise ModelError(
            f"{name} post-processes its logits in an unknown way: {sent.flatten()[wrong]:g} at vocabulary entry "
            f"{wrong % sent.shape[-1]} became {received.flatten()[wrong]:g}, which is neither a scale nor a soft-cap. "
            f"{_REFERENCE_WAY_OUT}"
        )
    return HeadOptions(softcap=softcap, logit_scale=scale)
