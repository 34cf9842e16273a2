"""What an evaluation needs beside `Trainer`'s loop: tokenized sets, which pairs count, and the loss of a whole set.

`hf_metrics.py` sums the metrics of its batches.
"""

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from orpo_plugins.data.dataset import are_several, as_rows, is_tokenized
from orpo_plugins.models.router import router_coefficient
from orpo_plugins.objective import loss_of_means
from orpo_plugins.options import ORPOOptions


def tokenized(dataset: Any, name: str, args: TrainingArguments, prepare: Callable[[Any, str], Any]) -> Any:
    """A dataset, or several by name; `prepare(rows, name)` is called for each one that is not tokenized yet."""
    if are_several(dataset):
        return {each: tokenized(rows, str(each), args, prepare) for each, rows in dataset.items()}
    dataset = as_rows(dataset, name)
    if is_tokenized(dataset):
        return dataset
    with args.main_process_first(desc=f"tokenizing the {name} set"):
        return prepare(dataset, name)


def number_that_count(accelerator: Accelerator, num_pairs: int) -> int:
    """How many pairs of this rank's batch count.

    The last batches of a set are filled up with its first pairs, so that all ranks have some; these do not count.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return num_pairs
    before = accelerator.process_index * num_pairs
    return int(min(max(state.remainder - before, 0), num_pairs))


def loss_of_set(metrics: Mapping[str, float], options: ORPOOptions, model: nn.Module) -> float:
    """The loss of a whole evaluation set, from the means of its metrics."""
    terms = (weight * metrics[f"loss_terms/{name}"] for name, weight in options.loss_terms.items())
    loss = loss_of_means(metrics["nll_loss"], metrics["log_odds_ratio"], options.beta) + sum(terms)
    return loss + router_coefficient(model) * metrics["aux_loss"] if "aux_loss" in metrics else loss
