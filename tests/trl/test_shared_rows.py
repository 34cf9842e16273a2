"""Real preference data: every row that teaches something is trained on, by each trainer and by the command.

The files are not part of the repository: ORPO_SHARED_DATA names their folder, by default ../shared/data.
"""

from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import Trainer, TrainingArguments

from orpo_plugins import ORPOCollator, ORPOLoss, fuse_head
from tests.kit import SHARED_DATA, tiny
from tests.kit.training import logged, trainer

FILES = {"dpo_en_demo.json": 300, "politeness.json": 1100}


def path(name: str) -> Path:
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"{name} is not in {SHARED_DATA}: set ORPO_SHARED_DATA to the folder that holds it")
    return SHARED_DATA / name


def small_model() -> Any:
    return tiny.model(num_hidden_layers=1)


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_every_row_goes_through_the_trainer(name: str, count: int, tmp_path: Path) -> None:
    rows = load_dataset("json", data_files=str(path(name)), split="train")
    made = trainer(
        tmp_path,
        model=small_model(),
        rows=rows,
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=20,
        learning_rate=0.5,
        max_length=256,
    )
    made.train()
    assert len(rows) == count
    assert len(made.train_dataset) == sum(row["chosen"] != row["rejected"] for row in rows)  # six are equal
    assert made.state.global_step == count // 20
    losses = logged(made, "loss")
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_every_row_goes_through_the_command(name: str, count: int, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from orpo_plugins.integrations.trl_script import main

    small_model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": path(name),
        "output_dir": tmp_path / "out",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 20,
        "max_length": 256,
        "dtype": "float32",
        "report_to": "none",
        "save_strategy": "epoch",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 5,
    }
    main(["orpo", *(text for name, value in options.items() for text in (f"--{name}", str(value)))])
    assert (tmp_path / "out" / f"checkpoint-{count // 20}").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_every_row_goes_through_a_stock_trainer(name: str, count: int, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=20,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    collator = ORPOCollator(tiny.tokenizer(), max_length=256, layout="shared")
    stock = Trainer(
        model=small_model(),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(path(name)), split="train"),
        data_collator=collator,
        compute_loss_func=ORPOLoss(),
    )
    fuse_head(stock).train()
    assert stock.state.global_step == count // 20
    assert dict(collator.left_out) == ({"chosen equals rejected": 6} if name == "politeness.json" else {})
    found = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert found[-1] < found[0]
