"""ORPO heads of other packages, each as `peer(hidden, weight, labels, nll_labels) -> loss`.

Shapes and meaning are those of `linear_orpo_loss`: hidden [2B, T, H], labels [2B, T] already shifted, nll_labels
[B, T].  Every peer is used the way its documentation shows; where a package only has per-token
log-probabilities or a cross entropy, ORPO is built on these with `orpo_loss`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_plugins import linear_orpo_loss, orpo_loss

Peer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
IGNORE = -100


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """orpo-plugins with its defaults."""
    return linear_orpo_loss(hidden, weight, labels, nll_labels=nll_labels).loss


def ours_in_fp32(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """orpo-plugins with 16-bit operands multiplied in fp32."""
    return linear_orpo_loss(hidden, weight, labels, nll_labels=nll_labels, kernel="chunked_fp32").loss


def ours_with_budget(budget: int) -> Peer:
    """orpo-plugins with a given `memory_budget` in bytes."""

    def peer(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
        return linear_orpo_loss(hidden, weight, labels, nll_labels=nll_labels, memory_budget=budget).loss

    return peer


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """TRL's ORPOTrainer: all logits, its own `selective_log_softmax`, and a cross entropy on a shifted copy."""
    from trl.trainer.utils import selective_log_softmax

    logits = hidden @ weight.T
    pairs = len(nll_labels)
    nll = F.cross_entropy(logits[:pairs, :-1].contiguous().flatten(0, 1), nll_labels[:, :-1].flatten())
    inside = labels[:, :-1] != IGNORE
    logps = selective_log_softmax(logits[:, :-1], labels[:, :-1].clamp(min=0))
    means = (logps * inside).sum(-1) / inside.sum(-1)
    return orpo_loss(means[:pairs], means[pairs:], nll).loss


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """TRL 1.16's `ChunkedLogProbFunction`, with the chunk size of its fused heads."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    live, targets = live_targets(labels, nll_labels)
    logps = torch.zeros(labels.shape, device=hidden.device)
    rows = ChunkedLogProbFunction.apply(hidden[live], weight, None, targets[live], 1.0, 8192, None, 1.0, ())[0]
    return _objective(logps.masked_scatter(live, rows), labels, nll_labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor, *, compiled: bool = False) -> Tensor:
    """liger-kernel's `LigerFusedLinearORPOLoss`."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    # Its NLL targets have the shape of all rows; only the chosen half is read.
    nll_target = torch.cat([nll_labels, labels[len(nll_labels) :]])
    loss, _ = LigerFusedLinearORPOLoss(compiled=compiled)(weight, hidden, labels, nll_target=nll_target)
    return loss


def liger_compiled(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """The same through torch.compile, liger-kernel's default."""
    return liger(hidden, weight, labels, nll_labels, compiled=True)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """apple/ml-cross-entropy, its Triton kernels on GPUs and its torch.compile form elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    _, targets = live_targets(labels, nll_labels)
    # Its gradient filter drops small probabilities; exact gradients are what is compared here.
    impl = {"impl": "cce", "filter_eps": None} if hidden.is_cuda else {"impl": "torch_compile"}
    nll = linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORE, reduction="none", **impl)
    return _objective(-nll.float(), labels, nll_labels)


def liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """liger-kernel's per-token scaled cross entropy, with the fastest implementation that it finds for the device."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    live, targets = live_targets(labels, nll_labels)
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden[live], weight, targets[live])
    logps = torch.zeros(labels.shape, device=hidden.device, dtype=torch.float32)
    return _objective(-logps.masked_scatter(live, nll.float()), labels, nll_labels)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """torch's own `linear_cross_entropy` with its chunking options."""
    live, targets = live_targets(labels, nll_labels)
    nll = F.linear_cross_entropy(
        hidden[live], weight, targets[live], reduction="none", options=torch.nn.LinearCrossEntropyOptions()
    )
    logps = torch.zeros(labels.shape, device=hidden.device, dtype=nll.dtype)
    return _objective(-logps.masked_scatter(live, nll).float(), labels, nll_labels)


PEERS: dict[str, Peer] = {
    "ours": ours,
    "eager (TRL)": eager,
    "TRL chunked": trl_chunked,
    "Liger": liger,
    "Liger compiled": liger_compiled,
    "cut-cross-entropy": cut_cross_entropy,
    "torch chunked": torch_chunked,
}
if torch.cuda.is_available():  # elsewhere it falls back to a plain loop over chunks
    PEERS["Liger scaled"] = liger_scaled


VARIANTS: dict[str, Peer] = {"ours, fp32 products": ours_in_fp32}
"""Measured with --accuracy, or where --peers names them."""


def live_targets(labels: Tensor, nll_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(positions that predict something, what each predicts), both [2B, T]."""
    targets = labels.clone()
    targets[: len(nll_labels)] = torch.where(nll_labels != IGNORE, nll_labels, labels[: len(nll_labels)])
    return targets != IGNORE, targets


def _objective(logps: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """ORPO from per-token log-probabilities [2B, T]."""
    pairs, inside, in_nll = len(nll_labels), labels != IGNORE, nll_labels != IGNORE
    means = (logps * inside).sum(-1) / inside.sum(-1)
    nll = -(logps[:pairs] * in_nll).sum() / in_nll.sum()
    return orpo_loss(means[:pairs], means[pairs:], nll).loss
