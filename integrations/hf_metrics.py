"""Metrics of a run: summed on the device for each micro-batch, gathered from all ranks once per log."""

import logging
import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from orpo_plugins.denominators import Denominators
from orpo_plugins.errors import ModelError
from orpo_plugins.hooks import plugins
from orpo_plugins.objective import ORPOOutput
from orpo_plugins.options import ORPOOptions

logger = logging.getLogger(__name__)


class MetricSums:
    """Running (sum, weight) of every metric since the last log.  Only `pop` waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor | float]]) -> None:
        """Adds one micro-batch: metric name -> (sum of values, number of values)."""
        for name, (total, weight) in metrics.items():
            # fp32 on devices without fp64 (MPS); elsewhere fp64, so that a million small terms still add up.
            dtype = torch.float32 if total.device.type == "mps" else torch.float64
            total = total.to(dtype)
            # new_full fills on the device; a tensor made from a Python number would be copied there.
            count = weight.to(total) if isinstance(weight, Tensor) else total.new_full((), weight)
            entry = torch.stack([total, count])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def pop(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Means over all ranks since the last call, with one gather and one transfer; empties the sums."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names])
        if accelerator is not None:
            table = accelerator.reduce(table, reduction="sum")
        self._sums.clear()
        return {
            name: total / weight if weight else 0.0 for name, (total, weight) in zip(names, table.tolist(), strict=True)
        }


def metric_sums(
    output: ORPOOutput, options: ORPOOptions, totals: Denominators
) -> dict[str, tuple[Tensor, Tensor | float]]:
    """TRL's metric keys and ours for one micro-batch, each as (sum, weight).

    Per pair: `rewards/*` (beta times mean log-probability), `logps/*`, `log_odds_chosen`, `log_odds_ratio`,
    `answer_tokens/*` (tokens per answer), `loss_terms/*` (terms of plugins, unweighted) and the metrics of plugins.
    `nll_loss` is weighted as the loss weighs it: by tokens ("batch"), by micro-batch ("microbatch"), by pairs ("pair").
    A pair counts by its weight.  A pair without a rejected answer counts in `nll_loss` alone.
    """
    chosen, rejected = output.chosen_logps.detach(), output.rejected_logps.detach()
    per_pair = {
        "rewards/chosen": options.beta * chosen,
        "rewards/rejected": options.beta * rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": options.beta * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "log_odds_chosen": output.log_odds_chosen.detach(),
        "log_odds_ratio": output.log_odds_ratio.detach(),
        "answer_tokens/chosen": output.metrics["chosen_lengths"],
        "answer_tokens/rejected": output.metrics["rejected_lengths"],
    }
    per_pair |= {name: value for name, value in output.metrics.items() if name.startswith("loss_terms/")}
    per_pair |= {metric.name: metric.compute(output).detach().float() for metric in plugins.metrics()}
    weights = output.metrics["weights"]
    pairs = torch.where(output.metrics["rejected_lengths"] > 0, weights, 0.0)
    sums: dict[str, tuple[Tensor, Tensor | float]] = {}
    for name, values in per_pair.items():
        if values.shape == pairs.shape:
            # Not a product: values of a pair without a rejected answer are NaN.
            sums[name] = (torch.where(pairs > 0, values * pairs, 0.0).sum(), pairs.sum())
        else:
            sums[name] = (values.sum(), float(values.numel()))
    nll = output.nll_loss.detach()
    if options.nll_normalization == "batch":
        sums["nll_loss"] = (nll * totals.nll_tokens, output.metrics["nll_tokens"])
    elif options.nll_normalization == "pair":
        sums["nll_loss"] = (nll * totals.num_examples, weights.sum())
    else:
        sums["nll_loss"] = (nll, (weights.sum() > 0).float())
    for name, key in (("logits/chosen", "chosen_logits"), ("logits/rejected", "rejected_logits"), ("aux_loss",) * 2):
        if key in output.metrics:
            sums[name] = (output.metrics[key], 1.0)
    return sums


def check_finite(metrics: Mapping[str, float], step: int, *, warn_only: bool) -> None:
    """Raises `ModelError`, or logs a warning, where a metric is NaN or infinite.

    Called once per log, so that no micro-batch waits for the device.  `logging_nan_inf_filter` would hide such a loss.
    """
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not bad:
        return
    shown = ", ".join(f"{name}={value}" for name, value in sorted(bad.items()))
    message = (
        f"not finite at step {step}: {shown}. Some row's activations have overflowed or the weights are lost: resume "
        "from the last checkpoint with a lower learning rate, and with bf16 or fp32 in place of fp16"
    )
    if not warn_only:
        raise ModelError(message)
    logger.warning("%s", message)
