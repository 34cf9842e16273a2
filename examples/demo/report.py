"""What the demo's training changed: a table before and after, answers side by side, and the curves as a PNG.

python examples/demo/report.py         # after examples/demo/prepare.py and examples/demo/train.py
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BETA = 0.5  # orpo_alpha of the configs
QUESTIONS = (
    "My website shows an error 500.",
    "The washing machine shows the error E18.",
    "How can I move my photos to the new phone?",
)
"""Held-out questions that both models answer."""


def main() -> None:
    """Prints the table and the answers, draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="build/demo/base")
    parser.add_argument("--after", default="build/demo/output")
    parser.add_argument("--figure", default="build/demo/curves.png")
    options = parser.parse_args()
    # Optional libraries that transformers looks for complain about what this machine lacks.
    logging.disable(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    from orpo_plugins.integrations import cli_chat

    disable_progress_bar()
    tuned = cli_chat.Speaker(**dict(zip(("model", "tokenizer"), cli_chat.load(options.after), strict=True)))
    # A base model's own tokenizer may have no chat template; the configs add no tokens.
    model, _ = cli_chat.load(options.before)
    base = cli_chat.Speaker(model=model, tokenizer=tuned.tokenizer)
    rows = [json.loads(line) for line in (HERE / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    print(f"Scoring {len(rows)} held-out pairs with the model before and after training.", flush=True)
    print_table(len(rows), score(base, rows), score(tuned, rows))
    for question in QUESTIONS:
        print(f"\nCustomer (held-out): {question}\n", flush=True)
        cli_chat.compare(base, tuned, [question], cli_chat.ChatOptions(max_new_tokens=100, temperature=0))
    draw(log_of(Path(options.after)), options.figure)
    kind = "adapter" if hasattr(tuned.model, "peft_config") else "model"
    print(f"\nCurves: {options.figure}\nThe trained {kind}: {options.after}\nTalk to it, beside the model before:")
    print(f"  .venv/bin/orpo-plugins chat --model_name_or_path {options.after} --compare {options.before}")


def log_of(output: Path) -> list[dict[str, float]]:
    """The Trainer's log, from the newest checkpoint."""
    states = sorted(
        output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1])
    )
    history: list[dict[str, float]] = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return history


def score(speaker: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors: [pairs] mean log-probabilities per token of both answers, and [batches] NLL of the chosen ones."""
    import torch

    from orpo_plugins import ORPOCollator, orpo_forward

    collator = ORPOCollator(speaker.tokenizer, max_length=512, nll_over="completion")
    with torch.no_grad():
        batches = [collator(rows[start : start + 8]) for start in range(0, len(rows), 8)]
        outputs = [orpo_forward(speaker.model, batch, beta=BETA) for batch in batches]
    return {
        "chosen": torch.cat([output.chosen_logps for output in outputs]),
        "rejected": torch.cat([output.rejected_logps for output in outputs]),
        "nll": torch.stack([output.nll_loss for output in outputs]),
    }


def print_table(pairs: int, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Five figures, before and after training."""
    print(f"\n{f'{pairs} held-out pairs':<46}{'before':>9}{'after':>9}")
    lines: dict[str, Callable[[dict[str, Any]], Any]] = {
        "pairs in which the helpful answer is likelier": lambda x: (x["chosen"] > x["rejected"]).float().mean(),
        "reward margin (beta x difference)": lambda x: BETA * (x["chosen"] - x["rejected"]).mean(),
        "log-probability per token, helpful answer": lambda x: x["chosen"].mean(),
        "log-probability per token, brush-off": lambda x: x["rejected"].mean(),
        "NLL per token, helpful answer": lambda x: x["nll"].mean(),
    }
    for name, figure in lines.items():
        first, last = float(figure(before)), float(figure(after))
        shown = (f"{first:.0%}", f"{last:.0%}") if name.startswith("pairs") else (f"{first:+.3f}", f"{last:+.3f}")
        print(f"  {name:<44}{shown[0]:>9}{shown[1]:>9}")


def draw(history: list[dict[str, float]], path: str) -> None:
    """Log-probabilities, margins and accuracy over steps; lines for training, points for the held-out pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blue, orange, grey = "#1f6fb4", "#d9541e", "#444444"
    logps = [("logps/chosen", "helpful answer", blue), ("logps/rejected", "brush-off", orange)]
    panels = {
        "Mean log-probability per token": (logps, "best"),
        f"Reward margin ({BETA:g} x difference)": ([("rewards/margins", "helpful - brush-off", grey)], "upper left"),
        "Accuracy (helpful answer likelier)": ([("rewards/accuracies", "share of pairs", grey)], "lower right"),
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, (title, (curves, corner)) in zip(axes, panels.items(), strict=True):
        for key, label, color in curves:
            train = [(entry["step"], entry[key]) for entry in history if key in entry]
            held = [(entry["step"], entry[f"eval_{key}"]) for entry in history if f"eval_{key}" in entry]
            axis.plot(*zip(*train, strict=True), color=color, alpha=0.35, linewidth=1.2, label=f"{label}, training")
            axis.plot(*zip(*held, strict=True), color=color, marker="o", markersize=3, label=f"{label}, held-out")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5, loc=corner)
    axes[2].set_ylim(-0.03, 1.03)
    figure.suptitle("ORPO on customer-service answers, with Axolotl", fontsize=12)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
