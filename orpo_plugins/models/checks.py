"""Checks of a model before its first step: it has to be trainable and causal, with a position for every token.

No configuration says reliably whether a model is causal, and how many positions it has.  So each model runs once on a
few tokens before its first batch: see `examine`.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from orpo_plugins.errors import BatchError, ModelError
from orpo_plugins.models.head import (
    is_encoder_decoder,
    keep_four_bit_trainable,
    logits_of,
    output_head,
    row_numbers,
    unwrap_model,
    wrappers,
)
from orpo_plugins.models.state import Examined, state_of
from orpo_plugins.models.virtual_tokens import check_cache, own_positions, virtual_tokens

# ---- trainable


def check_trainable(model: nn.Module) -> None:
    """Raises `ModelError` where no parameter requires a gradient: training would change nothing.

    The loss does not show this under gradient checkpointing, where the outputs of the embeddings require a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    raise ModelError(
        f"no parameter of {type(unwrap_model(model)).__name__} requires a gradient, so training would change nothing: "
        f"{_remedy(model)}"
    )


def _remedy(model: nn.Module) -> str:
    if any(getattr(wrapper, "peft_config", None) for wrapper in wrappers(model)):
        return (
            "load the adapter with PeftModel.from_pretrained(model, path, is_trainable=True), or enable it if it was "
            "disabled"
        )
    return (
        "unfreeze what is to be trained (parameter.requires_grad_(True)), or train an adapter (peft_config=, or "
        "peft.get_peft_model; loading an adapter needs is_trainable=True)"
    )


def check_gradient(loss: Tensor, model: nn.Module | None = None) -> None:
    """Raises `ModelError` where a backward pass from `loss` (or logits) would reach no parameter.

    This only follows the autograd graph and computes nothing.  A graph with a hidden part, as reentrant checkpointing
    makes it, passes the check.
    """
    if (loss.is_leaf and loss.requires_grad) or _reaches_a_parameter(loss):
        return
    trainable = [] if model is None else [name for name, p in model.named_parameters() if p.requires_grad]
    what = f"none of the {len(trainable)} trainable parameters ({trainable[0]}, …)" if trainable else "no parameter"
    raise ModelError(
        f"the loss depends on {what}, so training would change nothing: unfreeze parameters that take part in the "
        "logits, and load adapters with PeftModel.from_pretrained(model, path, is_trainable=True) and enable them"
    )


def _reaches_a_parameter(loss: Tensor) -> bool:
    hidden = False
    for node in _graph(loss):
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        # A function written in Python may run layers again, whose parameters are not among its inputs.
        hidden |= isinstance(node, BackwardCFunction) and not _is_ours(node)
    return hidden


def check_causal_by_gradient(logits: Tensor) -> None:
    """Raises `ModelError` where the first logits of a row depend on later tokens, as far as the autograd graph shows.

    This is for callers that have logits but no model.  The gradient of a row's first logits must be zero at the
    embeddings of all its other tokens.  Nothing is checked where the graph has no embeddings of the batch (because they
    are frozen), where it has a hidden part (reentrant checkpointing), and on several ranks, whose wrappers expect one
    backward pass.
    """
    if logits.shape[1] < 2 or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    node, source = _embeddings(logits)
    if source is None:
        return
    found: list[Tensor] = []
    handle = None if node is None else node.register_prehook(lambda gradients: found.append(gradients[0]))
    try:
        (own,) = torch.autograd.grad(logits[:, 0].float().square().sum(), source, retain_graph=True)
    except RuntimeError:  # the graph does not allow a second backward pass, or not from here
        return
    finally:
        if handle is not None:
            handle.remove()
    gradient = found[0] if found else own
    norms = gradient.detach().float().norm(dim=-1)
    leak = float(norms[:, 1:].max() / norms[:, 0].max().clamp(min=1e-30))
    if leak > _TOLERANCE:
        raise ModelError(
            f"the model is not causal: its first logits have a gradient at later tokens ({leak:.1e} of that at the "
            "first one), so it would see the tokens that it has to predict. Take a causal language model, or make "
            "this one causal (PaliGemma: attn_implementation='eager')"
        )


def _embeddings(logits: Tensor) -> tuple[Any, Tensor | None]:
    """Finds the embeddings [R, T, H] of the logits' own rows in the autograd graph.

    Returns (the node that gets their gradient, the parameter behind it).  Where the embeddings are a leaf, as under
    gradient checkpointing with frozen weights, it returns (None, the embeddings); without embeddings, (None, None).
    """
    for node in _graph(logits):
        if type(node).__name__ == "EmbeddingBackward0" and tuple(node._saved_indices.shape) == logits.shape[:2]:
            source = getattr(node.next_functions[0][0], "variable", None)
            if isinstance(source, Tensor):
                return node, source
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf.ndim == 3 and leaf.shape[:2] == logits.shape[:2]:
            return None, leaf
    return None, None


def _graph(result: Tensor) -> Iterator[Any]:
    """All nodes of the autograd graph behind a tensor."""
    seen: set[Any] = set()
    stack: list[Any] = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


def _is_ours(node: Any) -> bool:
    return str(getattr(node, "_forward_cls", type(node)).__module__).startswith("orpo_plugins.")


# ---- causal, with positions

_KEPT, _CHANGED, _ENCODED = 2, 2, 7
"""Numbers of tokens in the examined rows: whose logits are compared, behind these, and in the input of an encoder.

There is one token more where an adapter has exactly as many virtual tokens: these are read from a table in order, too,
which must not be taken for a table of positions.
"""
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 2e-3, 4e-3
"""How much logits may change with the tokens behind them, relative to their length.

Measured on a small random model of every causal family of transformers.  Causal models: at most 5e-7 (mixtures of
experts, which multiply rows in other groups; 0 in bf16).  Others: at least 6e-2 (XLNet and XLM in bf16: 8e-3).
"""
_MADE_BY_COLLATORS = {"input_ids", "attention_mask", "position_ids", "decoder_input_ids", "labels", "shift_labels"}


def check_model(model: nn.Module, inputs: Mapping[str, Any], longest: int | None = None) -> None:
    """All checks of `model`, and of a batch's length, before the model runs on that batch.

    `longest` is the number of tokens of the longest sequence (`Layout.longest_sequence`), where it is known.

    Raises:
        ModelError: see `check_trainable` (in training only), `check_cache` and `examine`.
        BatchError: a row has more tokens than the model has positions.
    """
    output_head(model)
    if model.training and torch.is_grad_enabled():
        check_trainable(model)
    check_cache(model)
    examined = examine(model, inputs)
    for side, tokens, limit in (
        ("encoder_tokens", _encoded(inputs), examined.encoder_tokens),
        ("tokens", longest, examined.tokens),
    ):
        if tokens is not None and limit is not None and tokens > limit:
            raise BatchError(f"a row of the batch has {tokens} tokens, {too_few_positions(model, side, limit)}")


def too_few_positions(model: nn.Module, side: str, limit: int) -> str:
    """The end of an error about a row longer than `limit`; `side` names the field of `Examined` with this limit."""
    virtual = virtual_tokens(model)[side == "tokens"]
    beside = f" beside {virtual} virtual ones" if virtual else ""
    option = "max_length"
    if is_encoder_decoder(model):
        option = "max_completion_length" if side == "tokens" else "max_prompt_length"
    return (
        f"and {type(unwrap_model(model)).__name__} has positions for {limit}{beside}: set {option}={limit} (of "
        "ORPOConfig or ORPOCollator; in Axolotl sequence_len)"
    )


def _encoded(inputs: Mapping[str, Any]) -> int | None:
    return int(inputs["input_ids"].shape[-1]) if "decoder_input_ids" in inputs else None


def examine(model: nn.Module, inputs: Mapping[str, Any]) -> Examined:
    """Runs `model` once on a few tokens of a batch, and finds out whether logits depend on later tokens.

    1. Three passes without gradient and with the same random numbers; only their last tokens differ.
    2. Of the three differences between their first logits, the smallest counts.  A router near a tie may decide
       differently in one of the passes; two of them still agree.

    A model that was examined in training mode is not examined again in evaluation mode.  The state of the random number
    generators is restored.  All ranks run the same passes, because a sharded model needs all of them.

    Raises:
        ModelError: earlier logits depend on later tokens.  Not raised where the batch has inputs that no collator of
            this package makes, such as images and token types: these may decide which tokens attend to which.
    """
    inner, virtual = unwrap_model(model), virtual_tokens(model)
    known = state_of(inner).examined
    found = known.get((virtual, True)) or known.get((virtual, model.training))
    if found is None:
        found = known[virtual, model.training] = _examination(model, inputs, virtual)
    own = any(isinstance(v, Tensor) and v.ndim > 1 for key, v in inputs.items() if key not in _MADE_BY_COLLATORS)
    if found.leak > found.tolerance and not own:
        known.clear()  # the user may follow the advice on this very model, which is then examined again
        raise ModelError(
            f"{type(inner).__name__} is not causal: its logits change by {found.leak:.1e} with the tokens behind them "
            f"(relative, tolerance {found.tolerance:.0e}), so it would see the tokens that it has to predict. Take "
            "a causal language model, or make this one causal where it can be: attn_implementation='eager' (PaliGemma, "
            "Doge), or is_decoder=True, causal=True or use_bidirectional_attention=False in its configuration"
        )
    return found


def _examination(model: nn.Module, inputs: Mapping[str, Any], virtual: tuple[int, int]) -> Examined:
    keep_four_bit_trainable(model)
    kept = inputs["input_ids"].reshape(-1)[:_KEPT]
    changed, encoded = _CHANGED + (_KEPT + _CHANGED in virtual), _ENCODED + (_ENCODED in virtual)
    watch, passes = _Watch(_KEPT + changed), []
    for ending in _endings(inputs["input_ids"]):
        arguments = _row_inputs(model, torch.cat([kept, ending.repeat(changed)])[None], inputs, encoded)
        with _undisturbed(model), watch:
            logits = logits_of(model(**arguments, use_cache=False))
        passes.append(_compared(logits, model, arguments))
    return Examined(
        leak=_difference(passes),
        tolerance=_LOW_PRECISION_TOLERANCE if watch.in_16_bits else _TOLERANCE,
        tokens=_least(watch.limit(_KEPT + changed, virtual[1]), _buffered_positions(model)),
        encoder_tokens=watch.limit(encoded, virtual[0]) if is_encoder_decoder(model) else None,
    )


def _compared(logits: Tensor, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """[K, V]: the logits of a pass that are compared, less their mean over the vocabulary."""
    try:
        kept = own_positions(logits, model, arguments)[0, :_KEPT].float()
    except BatchError:  # the same error will come with the batch itself, whose numbers it should have
        return logits.new_full((1, 1), torch.nan)
    return kept - kept.mean(-1, keepdim=True)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _buffered_positions(model: nn.Module) -> int | None:
    """The length of a table of positions that is a plain tensor and not an embedding (GPT-J, CodeGen, CTRL)."""
    tables = (getattr(module, name, None) for module in model.modules() for name in ("embed_positions", "pos_encoding"))
    return _least(*(len(table) for table in tables if isinstance(table, Tensor) and table.ndim == 2))


def _row_inputs(model: nn.Module, row: Tensor, inputs: Mapping[str, Any], encoded: int) -> dict[str, Tensor]:
    """The model's arguments for one row."""
    others = row_numbers(inputs)
    if not is_encoder_decoder(model):
        return {**others, "input_ids": row, "attention_mask": torch.ones_like(row)}
    read = row[:, :1].expand(1, encoded)
    return {**others, "input_ids": read, "attention_mask": torch.ones_like(read), "decoder_input_ids": row}


def _endings(ids: Tensor) -> list[Tensor]:
    """Three different tokens, taken from the batch, where they are valid: others might stand for an image, say.

    A batch with fewer gets the first ids of the vocabulary besides, because all ranks have to run three passes.
    """
    known = torch.unique(ids)
    others = torch.arange(3, device=ids.device)
    return list(torch.cat([others[~torch.isin(others, known)], known])[-3:])


def _difference(passes: list[Tensor]) -> float:
    """The largest over positions of the smallest |difference| / |logits| over pairs of passes."""
    differences = []
    for first, second in ((0, 1), (0, 2), (1, 2)):
        lengths = torch.maximum(passes[first].norm(dim=-1), passes[second].norm(dim=-1)).clamp(min=1e-30)
        differences.append((passes[first] - passes[second]).norm(dim=-1) / lengths)
    return float(torch.stack(differences).amin(0).amax())


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs a forward pass without gradient or compilation, and restores the random number generators."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kind = next((device.type for device in devices), "cuda")
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(sorted(device.index or 0 for device in devices), device_type=kind),
    ):
        warnings.simplefilter("ignore")  # reentrant checkpointing misses its gradient
        yield


class _Watch(TorchFunctionMode):
    """Records the lengths of tables that are read at positions, and whether anything is computed in 16 bits."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self.in_16_bits = False
        self._limits: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.in_16_bits |= isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16)
        if func is torch.nn.functional.embedding:
            self._note(*args[:2])
        return result

    def _note(self, indices: Tensor, table: Tensor) -> None:
        """Records how many rows of a table can be read at positions, where they are read in order.

        Some tables begin with their second or third row.  Only embeddings have an end: rotary tables grow, or are
        computed.
        """
        width = indices.shape[-1] if indices.ndim else 0
        if width < self._tokens:
            return
        rows = indices.reshape(-1, width)
        if bool((rows == rows[0, 0] + torch.arange(width, device=rows.device)).all()):
            limit = table.shape[0] - int(rows[0, 0])
            self._limits[width] = min(limit, self._limits.get(width, limit))

    def limit(self, tokens: int, virtual: int) -> int | None:
        """The most tokens that the tables allow in a row; found with a row of `tokens`, maybe behind virtual ones."""
        if tokens + virtual in self._limits:
            return self._limits[tokens + virtual] - virtual
        return self._limits.get(tokens)  # with an adapter in the cache, positions begin behind its virtual tokens
