"""`linear_orpo_loss`: the objective from hidden states, an output matrix and padded labels."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from orpo_plugins.errors import BatchError, ConfigError
from orpo_plugins.hooks.types import HeadOptions, Objective
from orpo_plugins.kernels.run import run_kernel
from orpo_plugins.objective import ORPOOutput, PairLogps, check_coefficients, odds_ratio_loss, output_of
from orpo_plugins.options import check_option
from orpo_plugins.targets import IGNORE_INDEX, Targets


def linear_orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    nll_labels: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    odds_temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kernel: str = "auto",
    memory_budget: int | None = None,
    nll_tokens: Tensor | float | None = None,
    num_pairs: Tensor | float | None = None,
    pair_loss: Callable[[PairLogps], Tensor] | None = None,
) -> ORPOOutput:
    """ORPO from hidden states, without the logits ever being in memory at once.

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)
        logps = logits.log_softmax(-1).gather(-1, labels)
        chosen, rejected = mean of logps over each row's labels, split at B
        loss = -sum(logps of nll_labels) / nll_tokens + sum(pair_loss(chosen, rejected)) / num_pairs

    Args:
        hidden: [2B, T, H] in fp32, bf16, fp16 or fp64; rows 0..B-1 chosen (the paper's y_w), B..2B-1 rejected (y_l).
        weight: [V, H], the output matrix, in the dtype of `hidden` (any under autocast).
        labels: [2B, T] int64, the token that each position predicts (already shifted), `ignore_index` where none.
        nll_labels: [B, T], the same for the NLL of the chosen rows; default: the chosen half of `labels`.
        bias: [V] or None.
        beta: the paper's lambda, >= 0.
        odds_temperature: multiplies the log odds inside the sigmoid, > 0.
        ignore_index: marks positions that predict nothing; their hidden states are not read.
        softcap: c of c * tanh(logits / c), applied after the scale; None for none.
        logit_scale: multiplies hidden @ weight.T + bias.
        kernel: "auto", "reference", "chunked", "chunked_fp32" (16-bit operands multiplied in fp32), "triton" or a
            plugin's name.
        memory_budget: bytes that may be held beyond inputs and returned gradients; None leaves it to the kernel.
        nll_tokens: the NLL's denominator, > 0; default: the NLL tokens of this call.  Under gradient accumulation,
            those of the whole optimizer step.
        num_pairs: the same for pairs; default: B.
        pair_loss: maps `PairLogps` to [B], to be minimized in place of the odds-ratio term
            (SimPO, CPO, whatever torch can differentiate); `beta` and `odds_temperature` have no part in it then.

    Returns:
        `ORPOOutput`; only `loss` carries gradient, and it may be differentiated once.  `metrics` holds
        `chosen_lengths` and `rejected_lengths` [B] and `nll_tokens`.

    Memory: beyond inputs and returned gradients a few tiles of logits, and `memory_budget`; see `fused_head`.

    Raises:
        BatchError: shapes, dtypes or devices that do not fit together, an odd number of rows, a label outside
            0..V-1, an answer without a token, NaN or infinity in hidden states (looked for on CPUs only, where it
            costs no wait for the device).
        ConfigError: an unknown kernel, or a coefficient or denominator out of range.

    Source: equations 6 and 7 of Hong, Lee and Thorne 2024 (arXiv:2403.07691) for the default `pair_loss`.
    """
    check_coefficients(beta, odds_temperature)
    _check_options(softcap, logit_scale, memory_budget, nll_tokens, num_pairs)
    check_shapes(hidden, weight, labels, nll_labels, bias)
    check_option("kernel", kernel)
    targets = Targets.from_labels(labels, nll_labels, ignore_index)
    check_labels(targets, labels.shape[1], weight.shape[0])
    flat = hidden.flatten(0, 1)
    _check_finite(flat, targets, labels.shape[1])

    per_pair = pair_loss or functools.partial(odds_ratio_loss, beta=beta, odds_temperature=odds_temperature)
    objective = _objective(targets, per_pair, nll_tokens, num_pairs)
    options = HeadOptions(softcap=softcap, logit_scale=logit_scale, memory_budget=memory_budget)
    result = run_kernel(kernel, flat, weight, bias, targets, objective, options)
    lengths = targets.answer_lengths().view(2, -1)
    return output_of(
        loss=result.loss,
        nll_loss=result.nll_loss,
        logps=result.logps,
        odds_temperature=odds_temperature,
        metrics={"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "nll_tokens": targets.in_nll.sum()},
    )


def _objective(
    targets: Targets,
    per_pair: Callable[[PairLogps], Tensor],
    nll_tokens: Tensor | float | None,
    num_pairs: Tensor | float | None,
) -> Objective:
    tokens = targets.in_nll.sum().clamp(min=1) if nll_tokens is None else nll_tokens
    pairs = targets.num_pairs if num_pairs is None else num_pairs
    return Objective(
        nll_weights=targets.in_nll.float() / tokens,
        pair_loss=lambda given: _summed(per_pair(given), given) / pairs,
    )


def _summed(per_pair: Tensor, pairs: PairLogps) -> Tensor:
    if per_pair.shape != pairs.chosen.shape:
        raise BatchError(
            f"pair_loss returned shape {tuple(per_pair.shape)} for {len(pairs.chosen)} pairs: "
            "return one number per pair, [B]; the mean over pairs is taken afterwards"
        )
    return per_pair.sum()


def _check_options(
    softcap: float | None,
    logit_scale: float,
    memory_budget: int | None,
    nll_tokens: Tensor | float | None,
    num_pairs: Tensor | float | None,
) -> None:
    if memory_budget is not None and memory_budget < 0:
        raise ConfigError(
            f"memory_budget is {memory_budget}: it is a number of bytes, or None for the kernel's default"
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ConfigError(f"softcap is {softcap}: it must be a finite number > 0, or None for no soft-cap")
    if not 0 < logit_scale < float("inf"):
        raise ConfigError(f"logit_scale is {logit_scale}: it must be a finite number > 0")
    for name, count in (("nll_tokens", nll_tokens), ("num_pairs", num_pairs)):
        if isinstance(count, int | float) and not count > 0:  # a tensor's device would have to be waited for
            raise ConfigError(f"{name} is {count}: the loss is divided by it. Give a number > 0, or None")


def check_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    nll_labels: Tensor | None,
    bias: Tensor | None,
    *,
    names: tuple[str, str, str, str] = ("hidden", "weight", "labels", "nll_labels"),
) -> None:
    """Raises `BatchError` for shapes, devices and index dtypes that do not fit together; `names` of the arguments."""
    first = names[0]
    if hidden.ndim != 3 or hidden.shape[0] == 0:
        raise BatchError(
            f"{first} has shape {tuple(hidden.shape)}: expected [2B, T, H], chosen rows before rejected ones"
        )
    if hidden.shape[0] % 2:
        raise BatchError(
            f"{first} has {hidden.shape[0]} rows, an odd number: expected B chosen rows and then B rejected ones"
        )
    rows, length, width = hidden.shape
    vocabulary = weight.shape[0] if weight.ndim else 0
    shapes = ((vocabulary, width), (rows, length), (rows // 2, length), (vocabulary,))
    for name, tensor, shape in zip((*names[1:], "bias"), (weight, labels, nll_labels, bias), shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise BatchError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for {first} of shape {tuple(hidden.shape)}"
            )
        if tensor.device != hidden.device:
            raise BatchError(f"{name} is on {tensor.device} but {first} is on {hidden.device}: move it there")
    for name, indices in zip(names[2:], (labels, nll_labels), strict=True):
        if indices is not None and indices.dtype != torch.int64:
            raise BatchError(f"{name} has dtype {indices.dtype}: token ids must be torch.int64")


def check_labels(targets: Targets, length: int, vocabulary: int) -> None:
    """Raises `BatchError` for a token outside of 0..vocabulary-1 and for an answer without a token."""
    outside = (targets.token_ids < 0) | (targets.token_ids >= vocabulary)
    empty = targets.answer_lengths() == 0
    if not bool(outside.any() | empty.any()):
        return
    if bool(outside.any()):
        target = int(outside.nonzero()[0])
        row, position = divmod(int(targets.positions[target]), length)
        raise BatchError(
            f"the label at [{row}, {position}] is {int(targets.token_ids[target])}, outside 0..{vocabulary - 1}: "
            "mark positions without a label with ignore_index, or use the tokenizer that belongs to the weight"
        )
    row = int(empty.nonzero()[0])
    side = "chosen" if row < targets.num_pairs else "rejected"
    raise BatchError(
        f"row {row} ({side} answer of pair {row % targets.num_pairs}) has no label: its mean log-probability "
        "is undefined. Drop the pair"
    )


def _check_finite(hidden: Tensor, targets: Targets, length: int) -> None:
    # On other devices the host would have to wait for the answer; there the loss becomes NaN or infinite.  The extremes
    # come first, because a look at every position takes memory.
    if hidden.device.type != "cpu" or not hidden.numel() or all(x.isfinite() for x in hidden.detach().aminmax()):
        return
    finite = torch.isfinite(hidden.detach()).all(1)[targets.positions]
    if bool(finite.all()):
        return
    target = int((~finite).nonzero()[0])
    row, position = divmod(int(targets.positions[target]), length)
    raise BatchError(
        f"hidden[{row}, {position}] contains NaN or infinity: look for an overflow in the model "
        "(fp16 without loss scaling, a learning rate too high) before this step"
    )
