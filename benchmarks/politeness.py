"""A small model learns a preference on a CPU: 1,000 pairs of politeness.json for training, the other 100 held out.

    python benchmarks/politeness.py --data ../shared/data/politeness.json

Writes the curve to benchmarks/results/politeness.json and docs/images/politeness.png.  The model (Llama-like, from
scratch) and its tokenizer (byte-level BPE) are made on the spot from the training rows alone.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, about, pyplot, save
from step_cases import byte_level_bpe
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_plugins import ORPOConfig, ORPOTrainer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CURVES = ("loss", "nll_loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")


def rows_and_tokenizer(path: Path) -> tuple[list[Any], list[Any], PreTrainedTokenizerFast]:
    """(1,000 rows for training, the other 100, a ChatML tokenizer made from the former)."""
    rows = json.loads(path.read_text())
    train, held_out = rows[:1000], rows[1000:]
    texts = [row[column] for row in train for column in ("instruction", "input", "chosen", "rejected")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, 1000, ["<pad>", "<|im_start|>", "<|im_end|>"]),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )
    return train, held_out, tokenizer


def small_llama(vocab_size: int) -> LlamaForCausalLM:
    """One layer of 64.  With 1,000 pairs to learn from, larger models remember rows instead of learning the tone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_trainer(
    model: Any, tokenizer: Any, rows: list[Any], held_out: list[Any] | None, folder: str, **options: Any
) -> ORPOTrainer:
    """ORPOTrainer on a CPU, evaluated every 25 steps where rows are held out."""
    args = ORPOConfig(
        output_dir=folder,
        max_length=256,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=20,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=25,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=25,
        save_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    return ORPOTrainer(model, args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)


def run(data: Path, epochs: float, beta: float) -> dict[str, Any]:
    """Trains, evaluates, and returns the curve."""
    train, held_out, tokenizer = rows_and_tokenizer(data)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    torch.manual_seed(0)
    model = small_llama(len(tokenizer))
    options = {"beta": beta, "num_train_epochs": epochs, "learning_rate": 2e-3, "weight_decay": 1.0, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        trainer = make_trainer(model, tokenizer, train, held_out, folder, **options)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        seconds = time.process_time() - started
    history = trainer.state.log_history
    return {
        **about("torch", "transformers"),
        "cpu_minutes": round(seconds / 60, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": {name: before[f"eval_{name}"] for name in CURVES},
        "after": {name: after[f"eval_{name}"] for name in CURVES},
        "train": [{"step": e["step"], **{n: e[n] for n in CURVES}} for e in history if "loss" in e],
        "held_out": [{"step": e["step"], **{n: e[f"eval_{n}"] for n in CURVES}} for e in history if "eval_loss" in e],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Log-probabilities, margin and accuracy over steps, on the held-out pairs."""
    plt = pyplot()
    if plt is None:
        return
    points = result["held_out"]
    steps = [point["step"] for point in points]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for name, color in (("logps/chosen", "tab:green"), ("logps/rejected", "tab:red")):
        axes[0].plot(steps, [point[name] for point in points], color=color, label=name.split("/")[1])
    axes[0].set_title("mean log-probability per answer token")
    axes[0].legend()
    axes[1].plot(steps, [point["rewards/margins"] for point in points], color="tab:blue")
    axes[1].set_title("reward margin")
    axes[2].plot(steps, [point["rewards/accuracies"] for point in points], color="tab:purple")
    axes[2].axhline(0.9, color="gray", linewidth=0.8, linestyle="--")
    axes[2].set_ylim(0, 1.02)
    axes[2].set_title("reward accuracy, 100 held-out pairs")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with `--data`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "politeness.json")
    return made


def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--epochs", type=float, default=4)
    command.add_argument("--beta", type=float, default=10.0)
    arguments = command.parse_args()
    result = run(arguments.data, arguments.epochs, arguments.beta)
    save("politeness", result)
    plot(result, ROOT / "docs" / "images" / "politeness.png")
    accuracy, minutes = result["after"]["rewards/accuracies"], result["cpu_minutes"]
    print(f"held-out reward accuracy {accuracy:.2f} (before: {result['before']['rewards/accuracies']:.2f})")
    print(f"{minutes:.1f} CPU minutes for {result['parameters'] / 1e6:.2f} million parameters")


if __name__ == "__main__":
    main()
