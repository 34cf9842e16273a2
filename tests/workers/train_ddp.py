"""Trains through ORPOTrainer on one or several ranks, once per given set of options; rank 0 saves what was seen.

Usage: train_ddp.py <json list of options> <output file>
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))
from orpo_plugins import ORPOConfig, ORPOTrainer
from tests.kit import tiny


def train(options: dict[str, Any], folder: str) -> tuple[dict[str, Any], ORPOTrainer]:
    """{"change": what training changed in the weights, "logs": the log history, "eval": metrics} of one run."""
    rows = tiny.skewed_rows(options.pop("rows"))
    eval_rows = tiny.rows(options.pop("eval_rows", 0))
    resume = options.pop("resume", None)  # the step of a checkpoint of an earlier run
    streaming = options.pop("streaming", False)
    arguments = {
        "output_dir": folder,
        "max_length": 512,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    model = tiny.model(initializer_range=0.2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dataset = Dataset.from_list(rows)
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(**arguments),
        train_dataset=dataset.to_iterable_dataset() if streaming else dataset,
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tiny.tokenizer(),
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{resume}" if resume else None)
    metrics = trainer.evaluate() if eval_rows else {}
    change = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    return {"change": change, "logs": trainer.state.log_history, "eval": metrics}, trainer


def threads_of_gloo() -> list[str]:
    """Threads that a process group leaves behind while anything still owns it."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def main() -> None:
    """Trains with each set of options in turn."""
    runs, output = json.loads(sys.argv[1]), sys.argv[2]
    results = []
    for options in runs:
        result, trainer = train(options, f"{output}.dir")
        results.append(result)
    if trainer.is_world_process_zero():
        torch.save(results, output)
    trainer.end()
    assert not threads_of_gloo(), threads_of_gloo()


if __name__ == "__main__":
    main()
