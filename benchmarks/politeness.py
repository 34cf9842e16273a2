"""A small model learns a preference on a CPU: 1,000 pairs of politeness.json for training, the other 100 held out.

    python benchmarks/politeness.py --data ../shared/data/politeness.json

Writes the curve to benchmarks/results/politeness.json and docs/images/politeness.png.  The model (Llama-like, from
scratch) and its tokenizer (byte-level BPE) are made on the spot from the training rows alone.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_plugins import ORPOConfig, ORPOTrainer

ROOT = Path(__file__).parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CURVES = ("loss", "nll_loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML
    )


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


def run(data: Path, epochs: float, beta: float) -> dict[str, Any]:
    """Trains, evaluates every 25 steps, and returns the curve."""
    rows = json.loads(data.read_text())
    train, held_out = rows[:1000], rows[1000:]
    texts = [row[column] for row in train for column in ("instruction", "input", "chosen", "rejected")]
    tokenizer = train_tokenizer(texts, vocab_size=1000)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    torch.manual_seed(0)
    model = small_llama(len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        args = ORPOConfig(
            output_dir=folder,
            beta=beta,
            max_length=256,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=20,
            learning_rate=2e-3,
            weight_decay=1.0,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=25,
            eval_strategy="steps",
            eval_steps=25,
            save_strategy="no",
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            seed=0,
        )
        started = time.process_time()
        trainer = ORPOTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        seconds = time.process_time() - started
    history = trainer.state.log_history
    return {
        "command": f"python benchmarks/politeness.py --epochs {epochs:g} --beta {beta:g}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "cpu_minutes": round(seconds / 60, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": {name: before[f"eval_{name}"] for name in CURVES},
        "after": {name: after[f"eval_{name}"] for name in CURVES},
        "train": [{"step": e["step"], **{n: e[n] for n in CURVES}} for e in history if "loss" in e],
        "held_out": [{"step": e["step"], **{n: e[f"eval_{n}"] for n in CURVES}} for e in history if "eval_loss" in e],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Log-probabilities, margin and accuracy over steps, on the held-out pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "politeness.json")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--beta", type=float, default=10.0)
    arguments = parser.parse_args()
    result = run(arguments.data, arguments.epochs, arguments.beta)
    (ROOT / "benchmarks" / "results" / "politeness.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, ROOT / "docs" / "images" / "politeness.png")
    accuracy, minutes = result["after"]["rewards/accuracies"], result["cpu_minutes"]
    print(f"held-out reward accuracy {accuracy:.2f} (before: {result['before']['rewards/accuracies']:.2f})")
    print(f"{minutes:.1f} CPU minutes for {result['parameters'] / 1e6:.2f} million parameters")


if __name__ == "__main__":
    main()
