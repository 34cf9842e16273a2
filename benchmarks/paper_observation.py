"""The observation that ORPO starts from (arXiv:2403.07691, section 3), repeated on a CPU with real pairs.

    python benchmarks/paper_observation.py --data ../shared/data/politeness.json

Fine-tuning on chosen answers alone (lambda 0) raises the log-probability of rejected answers along with theirs; the
odds-ratio term holds the rejected ones back.  Two starts: a model that knows nothing, and a base model made from both
answers of the training rows alike, which knows their language and prefers neither.  From each, the same rows, order
and steps for every lambda.  Lambda 0 computes the odds ratio without weight, so that all metrics exist for it too.

Writes benchmarks/results/paper_observation.json and docs/images/paper_observation.png.
"""

import copy
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, about, pyplot, save
from politeness import make_trainer, parser, rows_and_tokenizer, small_llama

LAMBDAS = (0.0, 0.1, 0.5, 1.0)
METRICS = ("logps/chosen", "logps/rejected", "log_odds_chosen", "rewards/accuracies", "nll_loss")
COLORS = ("tab:gray", "tab:blue", "tab:orange", "tab:red")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where training begins."""

    base_epochs: float
    """Epochs over both answers of every row, before any preference; 0: random weights."""
    epochs: float
    """Epochs over the pairs."""
    learning_rate: float


STARTS = {
    "from random weights": Start(base_epochs=0, epochs=4, learning_rate=2e-3),
    "from a base model": Start(base_epochs=3, epochs=3, learning_rate=1e-3),
}


def train(model: Any, tokenizer: Any, rows: list[Any], held_out: list[Any] | None, **options: Any) -> list[Any]:
    """Trains `model` in place; the held-out metrics before training and every 25 steps."""
    with tempfile.TemporaryDirectory() as folder:
        options["eval_on_start"] = held_out is not None
        trainer = make_trainer(model, tokenizer, rows, held_out, folder, **options)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return [{"step": entry["step"], **{name: entry[f"eval_{name}"] for name in METRICS}} for entry in history]


def first_model(tokenizer: Any, rows: list[Any], seed: int, epochs: float) -> Any:
    """Random weights, then a model that has read both answers of every row without any preference."""
    torch.manual_seed(seed)
    model = small_llama(len(tokenizer))
    if epochs:
        texts = [{**row, "chosen": row[answer], "rejected": None} for row in rows for answer in ("chosen", "rejected")]
        train(model, tokenizer, texts, None, sft_rows=True, num_train_epochs=epochs, learning_rate=2e-3, seed=seed)
    return model


def curves(start: Start, tokenizer: Any, pairs: list[Any], held_out: list[Any], seeds: int) -> dict[str, Any]:
    """Lambda to its curve, the mean over seeds."""
    models = [first_model(tokenizer, pairs, seed, start.base_epochs) for seed in range(seeds)]
    found = {}
    for beta in LAMBDAS:
        options = {"beta": beta, "num_train_epochs": start.epochs, "learning_rate": start.learning_rate}
        runs = [
            train(copy.deepcopy(model), tokenizer, pairs, held_out, seed=seed, nll_over="completion", **options)
            for seed, model in enumerate(models)
        ]
        found[f"{beta:g}"] = mean_curve(runs)
        print(f"lambda {beta:g}: {found[f'{beta:g}'][-1]}", flush=True)
    return found


def mean_curve(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The mean over seeds at each step, and the largest distance of a seed from it for the log-probabilities."""
    points = []
    for entries in zip(*runs, strict=True):
        point = {name: statistics.fmean(entry[name] for entry in entries) for name in ("step", *METRICS)}
        for name in ("logps/chosen", "logps/rejected"):
            point[f"{name}/spread"] = max(abs(entry[name] - point[name]) for entry in entries)
        points.append({name: round(value, 5) for name, value in point.items()})
    return points


def measure(data: Path, seeds: int) -> dict[str, Any]:
    """All starts, lambdas and seeds."""
    pairs, held_out, tokenizer = rows_and_tokenizer(data)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    started = time.process_time()
    held_out_curves = {name: curves(start, tokenizer, pairs, held_out, seeds) for name, start in STARTS.items()}
    return {
        **about("torch", "transformers"),
        "cpu_minutes": round((time.process_time() - started) / 60, 2),
        "seeds": seeds,
        "parameters": sum(p.numel() for p in small_llama(len(tokenizer)).parameters()),
        "held_out": held_out_curves,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Per start, chosen and rejected log-probabilities for each lambda, and the log odds ratio of all."""
    plt = pyplot()
    if plt is None:
        return
    figure, grid = plt.subplots(len(STARTS), len(LAMBDAS) + 1, figsize=(17, 6.6))
    for axes, (start, found) in zip(grid, result["held_out"].items(), strict=True):
        for axis, (beta, points), color in zip(axes, found.items(), COLORS, strict=False):
            steps = [point["step"] for point in points]
            for name, side in (("logps/chosen", "tab:green"), ("logps/rejected", "tab:red")):
                axis.plot(steps, [point[name] for point in points], color=side, label=name.split("/")[1])
            axis.set_title("SFT alone (λ = 0)" if beta == "0" else f"ORPO, λ = {beta}")
            axes[-1].plot(steps, [point["log_odds_chosen"] for point in points], color=color, label=f"λ = {beta}")
        limits = [limit for axis in axes[:-1] for limit in axis.get_ylim()]
        for axis in axes[:-1]:
            axis.set_ylim(min(limits), max(limits))
        axes[0].set_ylabel(f"{start}:\nmean log-probability per answer token")
        axes[-1].set_title("log odds ratio")
    for axis in grid.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--seeds", type=int, default=3)
    arguments = command.parse_args()
    result = measure(arguments.data, arguments.seeds)
    save("paper_observation", result)
    plot(result, ROOT / "docs" / "images" / "paper_observation.png")
    print(f"{result['cpu_minutes']:.1f} CPU minutes")


if __name__ == "__main__":
    main()
