"""Trains a model that DeepSpeed's ZeRO cuts over several ranks: a hand-written loop, or ORPOTrainer.

Usage: train_deepspeed.py <json list of options> <output file>
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# Read on import; on a machine with a GPU both ranks would go there.
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import Tensor
from train_fsdp2 import PAIRS_PER_STEP, steps, untrained

sys.path.insert(0, str(Path(__file__).parents[2]))
from orpo_plugins import ORPOConfig, ORPOTrainer, orpo_forward
from tests.kit import tiny


def config(stage: int, **options: Any) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        # By default weights of fewer than 100,000 elements, which here are all, stay whole on every rank.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **options,
    }


def train(options: dict[str, Any], rank: int, ranks: int) -> dict[str, Tensor]:
    """What five SGD steps of eight pairs change in the weights, by a loop over `orpo_forward`."""
    model, before = untrained(options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=options["learning_rate"])
    size, stage = options["batch_size"], options["stage"]
    batches = {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": PAIRS_PER_STEP // size // ranks,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, **batches))
    assert stage != 3 or all(parameter.numel() == 0 for parameter in model.parameters())
    for step, tokens in steps(options):
        for batch in step[rank::ranks]:
            # Data parallelism averages gradients, so the step's totals are divided by the number of ranks.
            out = orpo_forward(
                engine, batch, kernel=options["kernel"], nll_tokens=tokens / ranks, num_pairs=PAIRS_PER_STEP / ranks
            )
            # The totals are those of the whole step: the engine must not divide by the number of micro-batches.
            engine.backward(out.loss, scale_wrt_gas=False)
            # With gloo, DeepSpeed 0.18.9 gathers stages 1 and 2 into views, which torch 2.13 refuses while it records.
            with torch.no_grad():
                engine.step()
    change = {}
    for name, parameter in model.named_parameters():
        # One by one: of several, DeepSpeed waits for the last alone, and gloo does not keep their order.
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            change[name] = parameter.detach() - before[name]
    engine.destroy()
    return change


def train_through_trainer(options: dict[str, Any], folder: str) -> dict[str, Any]:
    """{"change": of the saved weights, "logs": the log history, "eval": metrics} of five steps; for rank 0."""
    eval_rows, stage = options.pop("eval_rows"), options.pop("stage")
    batches = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    arguments = ORPOConfig(
        output_dir=folder,
        max_length=512,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        deepspeed=config(stage, **batches),
        **options,
    )
    trainer = ORPOTrainer(
        model=f"{folder}/untrained",
        args=arguments,
        train_dataset=Dataset.from_list(tiny.skewed_rows(5 * PAIRS_PER_STEP)),
        eval_dataset=Dataset.from_list(tiny.rows(eval_rows)),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(f"{folder}/trained")
    logs = trainer.state.log_history
    trainer.end()
    if not trainer.is_world_process_zero():  # which alone knows that the weights are written
        return {}
    before, after = (load_file(f"{folder}/{name}/model.safetensors") for name in ("untrained", "trained"))
    return {"change": {name: after[name] - before[name] for name in before}, "logs": logs, "eval": metrics}


def main() -> None:
    """Trains with each set of options in turn, the last one through `ORPOTrainer`; rank 0 saves."""
    runs, output = json.loads(sys.argv[1]), sys.argv[2]
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    # Compiled on first use, which takes a minute; gloo does without.
    deepspeed.ops.__compatible_ops__[get_accelerator().create_op_builder("ShareMemCommBuilder").NAME] = False
    deepspeed.init_distributed("gloo")
    *runs, last = runs
    results: list[Any] = [train(options, rank, ranks) for options in runs]
    if rank == 0:
        tiny.saved(Path(f"{output}.dir/untrained"), initializer_range=0.2)
    dist.barrier()
    results.append(train_through_trainer(last, f"{output}.dir"))
    if rank == 0:
        torch.save(results, output)


if __name__ == "__main__":
    main()
