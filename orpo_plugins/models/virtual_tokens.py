"""PEFT adapters with virtual tokens before every sequence, and which of the model's positions belong to the batch.

Prompt tuning, P-tuning, multitask prompt tuning and CPT add V embeddings before each row.  For rows of T tokens the
model then returns V + T positions, and only the last T belong to the batch.

Prefix tuning and cartridges add V keys and values to the cache of every layer.  The model then returns T positions, but
each layer must be able to read its cache.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, Protocol

from torch import Tensor, nn

from orpo_plugins.errors import BatchError, ModelError
from orpo_plugins.models.head import is_encoder_decoder, unwrap_model, wrappers

_IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")


class VirtualTokenConfig(Protocol):
    """The fields of PEFT's `PromptLearningConfig` that are read here."""

    peft_type: Enum
    num_virtual_tokens: int


def adapter_of(model: nn.Module) -> VirtualTokenConfig | None:
    """PEFT's configuration of the active adapter, if that has virtual tokens; otherwise None."""
    for wrapper in wrappers(model):
        name, configs = getattr(wrapper, "active_adapter", None), getattr(wrapper, "peft_config", None)
        if isinstance(name, str) and isinstance(configs, Mapping):
            config = configs.get(name)
            return config if getattr(config, "is_prompt_learning", False) else None
    return None


def is_in_the_cache(config: object) -> bool:
    """Whether an adapter (its configuration, or None) has its virtual tokens in the layers' cache."""
    return getattr(config, "peft_type", None) in _IN_THE_CACHE


def virtual_tokens(model: nn.Module) -> tuple[int, int]:
    """How many virtual tokens the active adapter adds before the input of (an encoder, the decoder)."""
    config = adapter_of(model)
    if config is None:
        return 0, 0
    number = config.num_virtual_tokens
    if is_in_the_cache(config) or not is_encoder_decoder(model):
        return 0, number
    return number, number if config.peft_type.value == "MULTITASK_PROMPT_TUNING" else 0


def own_positions(values: Tensor, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """[R, T, D]: the part of `values` [R, V + T, D] that belongs to the batch's own tokens.

    R and T are the shape of `decoder_input_ids`, or of `input_ids` where there are none.  `values` may be flattened.

    Raises:
        BatchError: the number of positions is neither T, nor V + T with the V of the active adapter.
    """
    rows, width = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
    virtual = 0 if is_in_the_cache(adapter_of(model)) else virtual_tokens(model)[1]
    positions, rest = divmod(values.shape[:-1].numel(), rows)
    if rest or positions not in (width, width + virtual):
        adapter = f" and {virtual} virtual tokens" if virtual else ""
        raise BatchError(
            f"{type(unwrap_model(model)).__name__} returned {values.shape[:-1].numel()} positions for {rows} rows of "
            f"{width} tokens{adapter}, so which of them predicts which token is not known. Something between the batch "
            "and the head adds positions or leaves some out (a wrapper, a patch, sequence parallelism): turn it off"
        )
    return values.reshape(rows, positions, -1)[:, positions - width :]


def check_cache(model: nn.Module) -> None:
    """Raises `ModelError` for an adapter in the cache under gradient checkpointing, which runs layers without one."""
    config = adapter_of(model)
    if config is None or not (is_in_the_cache(config) and model.training and checkpointed(model)):
        return
    raise ModelError(
        f"{config.peft_type.value.lower().replace('_', ' ')} puts its virtual tokens into the cache, and gradient "
        "checkpointing runs layers without one: call model.gradient_checkpointing_disable(), or set "
        "gradient_checkpointing=False"
    )


def checkpointed(model: nn.Module) -> bool:
    """Whether any layer runs again in the backward pass: by transformers, or by torch's wrapper (FSDP)."""
    return any(
        getattr(module, "gradient_checkpointing", False) or "_checkpoint_wrapped_module" in module._modules
        for module in model.modules()
    )


def stop_checkpointing(model: nn.Module) -> None:
    """Turns gradient checkpointing off.  transformers has a new name for it since 5.24."""
    inner: Any = unwrap_model(model)
    new = getattr(inner, "activation_checkpointing_disable", None)
    (inner.gradient_checkpointing_disable if new is None else new)()
