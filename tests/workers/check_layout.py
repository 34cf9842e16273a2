"""Checks a layout that is wrong on the second of two ranks only: in ORPOTrainer, and on a sharded model by itself.

Usage: check_layout.py <json list of options> <output file>
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2]))
from orpo_plugins import ORPOCollator, ORPOConfig, ORPOTrainer, errors
from orpo_plugins.hooks import plugins
from orpo_plugins.layouts.check import check_layout
from tests.kit import tiny
from tests.kit.laid_out import WithoutContext


def train(options: dict[str, Any], folder: str) -> tuple[dict[str, Any], ORPOTrainer]:
    """{"layouts", "errors": of both ranks, "losses"} of one run of two steps."""
    arguments = {
        "output_dir": folder,
        "max_steps": 2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    trainer = ORPOTrainer(
        model=tiny.model(initializer_range=0.2),
        args=ORPOConfig(**arguments),
        train_dataset=Dataset.from_list(tiny.rows(16)),
        processing_class=tiny.tokenizer(),
    )
    if trainer.args.process_index == 1:
        trainer.data_collator.layout = WithoutContext()
    error = None
    try:
        trainer.train()
    except errors.ModelError as raised:
        error = str(raised)
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (trainer.data_collator.layout.name, error))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"layouts": [name for name, _ in both], "errors": [text for _, text in both], "losses": losses}, trainer


def check_sharded() -> list[Any]:
    """(whether it passed, the first layer that differs) by rank, of a model cut by `fully_shard`."""
    model: Any = tiny.model(initializer_range=0.2)
    shared = plugins.layout("shared")
    shared.prepare(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def on_any_rank(value: bool) -> bool:
        told = torch.tensor(int(value))
        dist.all_reduce(told)
        return bool(told)

    report = check_layout(
        model,
        ORPOCollator(tiny.tokenizer()).pairs(tiny.rows(2)),
        shared if dist.get_rank() == 0 else WithoutContext(),
        pad_token_id=0,
        on_any_rank=on_any_rank,
    )
    both: list[Any] = [None, None]
    first = report.first_layer and report.first_layer.removeprefix("model.").split("(")[0]
    dist.all_gather_object(both, (report.passed, first))
    return both


def main() -> None:
    """Goes through the sets of options in turn, a sharded one last."""
    runs, output = json.loads(sys.argv[1]), sys.argv[2]
    results: list[Any] = []
    for options in runs:
        if options.get("sharded"):
            results.append(check_sharded())
        else:
            result, trainer = train(options, f"{output}.dir")
            results.append(result)
    if trainer.is_world_process_zero():
        torch.save(results, output)
    trainer.end()


if __name__ == "__main__":
    main()
