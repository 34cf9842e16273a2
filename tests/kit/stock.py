"""A stock `transformers.Trainer` for ORPO, and what is read off it."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from orpo_plugins import ORPOCollator, ORPOLoss
from tests.kit import tiny


def stock(folder: Path, *, rows: Any = None, layout: str = "padded", loss: Any = None, **options: Any) -> Trainer:
    """A plain `Trainer` on raw rows."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        **options,
    }
    return Trainer(
        model=tiny.model(),
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(tiny.rows(16) if rows is None else rows),
        eval_dataset=Dataset.from_list(tiny.rows(4)),
        data_collator=ORPOCollator(tiny.tokenizer(), max_length=512, layout=layout),
        compute_loss_func=ORPOLoss(beta=0.2) if loss is None else loss,
    )


def change(trainer: Trainer) -> Tensor:
    """What training changes in the weights, as one vector: single norm weights near 1 round too coarsely."""
    before = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]) - before


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
