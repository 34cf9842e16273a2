"""What the demo's training changed: a table before and after, a sample, and the curves as a PNG.

python examples/demo/report.py         # after examples/demo/prepare.py and `axolotl train examples/demo/config.yml`
"""

import argparse
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from orpo_plugins import ORPOCollator, orpo_forward

HERE = Path(__file__).parent
BETA = 0.5  # orpo_alpha of config.yml


def main() -> None:
    """Prints the table and the sample, draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="build/demo/model")
    parser.add_argument("--after", default="build/demo/output")
    parser.add_argument("--figure", default="build/demo/curves.png")
    options = parser.parse_args()
    # Optional libraries that transformers looks for complain about what this machine lacks.
    logging.disable(logging.WARNING)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.after)
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (options.before, options.after))
    sets = {"training pairs": read("train.jsonl"), "held-out pairs": read("held_out.jsonl")}
    scores = {name: [score(model, tokenizer, rows) for model in (before, after)] for name, rows in sets.items()}
    for name, (first, last) in scores.items():
        print_table(f"{len(sets[name])} {name}", first, last)
    print_preferences(sets["held-out pairs"][:2], *scores["held-out pairs"])
    print_answer(after, tokenizer, sets["training pairs"][0], "a training question")
    print_answer(after, tokenizer, sets["held-out pairs"][5], "a held-out question")
    draw(log_of(Path(options.after)), options.figure)
    print(f"\nCurves: {options.figure}")


def read(name: str) -> list[dict[str, Any]]:
    """The rows of one of the demo's files."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def log_of(output: Path) -> list[dict[str, float]]:
    """The Trainer's log, from the newest checkpoint."""
    states = sorted(
        output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1])
    )
    history: list[dict[str, float]] = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return history


@torch.no_grad()
def score(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """[pairs, 2] mean log-probabilities per token of the chosen and the rejected answers."""
    output = orpo_forward(model, ORPOCollator(tokenizer, max_length=512)(rows), beta=BETA)
    return torch.stack([output.chosen_logps, output.rejected_logps], dim=1)


def print_table(title: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Four figures, before and after training."""
    print(f"\n{title:<44}{'before':>9}{'after':>9}")
    lines = {
        "log-probability per token, helpful answer": lambda x: x[:, 0].mean(),
        "log-probability per token, brush-off": lambda x: x[:, 1].mean(),
        "pairs in which the helpful answer is likelier": lambda x: (x[:, 0] > x[:, 1]).float().mean(),
        "reward margin (beta x difference)": lambda x: BETA * (x[:, 0] - x[:, 1]).mean(),
    }
    for name, figure in lines.items():
        first, last = float(figure(before)), float(figure(after))
        shown = (f"{first:.0%}", f"{last:.0%}") if name.startswith("pairs") else (f"{first:+.3f}", f"{last:+.3f}")
        print(f"  {name:<42}{shown[0]:>9}{shown[1]:>9}")


def print_preferences(rows: list[dict[str, Any]], before: torch.Tensor, after: torch.Tensor) -> None:
    """Both answers of some held-out rows, with what the model thinks of them."""
    print("\nWhat the model prefers now (held-out questions, log-probability per token before -> after)")
    for index, row in enumerate(rows):
        print_wrapped("customer", row["prompt"][0]["content"])
        better = after[index, 0] > after[index, 1]
        for column, part, name in ((0, "chosen", "helpful"), (1, "rejected", "brush-off")):
            mark = "  <- preferred" if better == (column == 0) else ""
            print_wrapped(name, row[part][0]["content"])
            print(f"  {'':<10}  {before[index, column]:+.2f} -> {after[index, column]:+.2f}{mark}")
        print()


@torch.no_grad()
def print_answer(model: Any, tokenizer: Any, row: dict[str, Any], where: str) -> None:
    """The model's own greedy answer."""
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**prompt, max_new_tokens=90, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(f"Its own answer to {where}")
    print_wrapped("customer", row["prompt"][0]["content"])
    print_wrapped("model", tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    print()


def print_wrapped(name: str, text: str) -> None:
    """One speaker's text, indented."""
    print(textwrap.fill(text.strip(), 100, initial_indent=f"  {name:<10}  ", subsequent_indent=" " * 14))


def draw(history: list[dict[str, float]], path: str) -> None:
    """Log-probabilities, margins and accuracy over steps; lines for training, points for the held-out pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blue, orange, grey = "#1f6fb4", "#d9541e", "#444444"
    logps = [("logps/chosen", "helpful answer", blue), ("logps/rejected", "brush-off", orange)]
    panels = {
        "Mean log-probability per token": (logps, "upper left"),
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
    figure.suptitle("ORPO on customer-service answers: a small Llama, from random weights, with Axolotl", fontsize=12)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
