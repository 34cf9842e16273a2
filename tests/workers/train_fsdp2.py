"""A hand-written loop around orpo_forward: plain, or with the model cut over several ranks by torch's fully_shard.

Usage: train_fsdp2.py <json list of options> <output file>
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from orpo_plugins import ORPOCollator, orpo_forward
from orpo_plugins.hooks import plugins
from tests.kit import tiny

PAIRS_PER_STEP = 8


def untrained(options: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that `options` ask for, and its weights."""
    name, tied = options.get("model", "Llama"), options.get("tied", False)
    model: Any = tiny.model(name, initializer_range=0.2, tie_word_embeddings=tied).train()
    if options.get("frozen"):
        model.lm_head.requires_grad_(False)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.get("adapter"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config)
    plugins.layout(options.get("layout", "padded")).prepare(model)
    return model, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def steps(options: dict[str, Any]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """(micro-batches, NLL tokens) of five optimizer steps."""
    collator = ORPOCollator(tiny.tokenizer(), max_length=512, layout=options.get("layout", "padded"))
    rows, size = tiny.skewed_rows(5 * PAIRS_PER_STEP), options["batch_size"]
    for first in range(0, len(rows), PAIRS_PER_STEP):
        step = [collator(rows[start : start + size]) for start in range(first, first + PAIRS_PER_STEP, size)]
        yield step, sum(int((batch["shift_labels"] != -100).sum()) for batch in step)


def train(options: dict[str, Any], rank: int, ranks: int) -> dict[str, Tensor]:
    """What five SGD steps of eight pairs change in the weights."""
    model, before = untrained(options)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in cast(Any, model).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=options["learning_rate"])
    for step, tokens in steps(options):
        for batch in step[rank::ranks]:
            # Data parallelism averages gradients, so the step's totals are divided by the number of ranks.
            out = orpo_forward(
                model, batch, kernel=options["kernel"], nll_tokens=tokens / ranks, num_pairs=PAIRS_PER_STEP / ranks
            )
            out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in model.named_parameters()
    }
    return {name: after[name].detach() - before[name] for name in before}


def main() -> None:
    """Trains with each set of options in turn; rank 0 saves."""
    runs, output = json.loads(sys.argv[1]), sys.argv[2]
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks > 1:
        dist.init_process_group("gloo")
    results = [train(options, rank, ranks) for options in runs]
    if rank == 0:
        torch.save(results, output)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
