"""A short way to a trainer in tests."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from orpo_plugins import ORPOConfig, ORPOTrainer
from tests.kit import tiny


def config(folder: Path, **options: Any) -> ORPOConfig:
    """Three quiet SGD steps on the CPU, without checkpointing, unless `options` say otherwise."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return ORPOConfig(**{**defaults, **options})


def trainer(folder: Path, *, model: Any = None, rows: Any = None, **options: Any) -> ORPOTrainer:
    """An `ORPOTrainer`; options of its constructor are passed on, all others go into the config."""
    own = {"eval_dataset", "peft_config", "callbacks", "compute_metrics", "model_init", "data_collator", "tokenizer"}
    arguments = {name: options.pop(name) for name in own & set(options)}
    if "model_init" not in arguments:
        arguments["model"] = tiny.model() if model is None else model
    if "tokenizer" not in arguments:
        arguments["processing_class"] = options.pop("processing_class", tiny.tokenizer())
    dataset = Dataset.from_list(tiny.rows(12)) if rows is None else rows
    return ORPOTrainer(args=config(folder, **options), train_dataset=dataset, **arguments)


def logged(made: ORPOTrainer, key: str) -> list[float]:
    """The values logged under a key, in order."""
    return [entry[key] for entry in made.state.log_history if key in entry]
