"""What a whole training step costs: ours against TRL's ORPOTrainer, same rows, same batches, same order.

    python benchmarks/step.py --data ../shared/data/dpo_en_demo.json
    python benchmarks/step.py --rows prompt-heavy answer-heavy        # made-up rows
    python benchmarks/step.py --data … --layouts auto packed padded   # what each layout is worth
    python benchmarks/step.py --model 8b --adapter lora --data …      # on a GPU
    python benchmarks/step.py --longest --limit 4                     # the longest rows that fit into 4 GiB
    python benchmarks/step.py --plot                                  # draws what earlier runs have written

Time from the end of one step to the end of the next: data, forward, backward, clipping and AdamW.  On a CPU it is
process time (all threads), on a GPU elapsed time.  Every measurement is a process of its own.  Results go to
benchmarks/results/step-trl<version>.json, one entry per kind of rows (on a GPU step-gpu-trl<version>.json, and with
--longest to longest-trl<version>.json); the plot of steps on a CPU goes to docs/images/step.png.

The model is a random Llama, by default 6 layers of 384 and a vocabulary of 32k: fp32 on a CPU, bf16 on a GPU.  Rows
longer than 1,024 tokens are left out, so that nothing is truncated: TRL's versions truncate differently.
"""

import argparse
import itertools
import json
import resource
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import CUDA, RESULTS, ROOT, about, in_child, peak_bytes, pyplot, save
from step_cases import FROM_DATA, MODELS, SHAPES, Row, llama, tokenizer_and_rows
from step_clock import Clock

LONGEST = 1024
PAIRS = 4
GOALS = {"trainable": 3.2, "frozen": 3.6}
SHORTEST = 256
# torch on a CPU and mmap, torch on a GPU, Python, C++, Rust (tokenizers): a step that needs too much ends its process.
OUT_OF_MEMORY = ("allocate memory", "out of memory", "MemoryError", "bad_alloc", "memory allocation of")
PACKAGES = ("torch", "transformers", "trl")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="dpo_en_demo.json (ShareGPT style), for the rows called demo")
    parser.add_argument("--rows", nargs="+", default=None, choices=[*FROM_DATA, *SHAPES])
    parser.add_argument("--layouts", nargs="+", default=["auto"])
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after one that is not (compiled: four)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--head", nargs="+", default=["trainable", "frozen"], choices=["trainable", "frozen"])
    parser.add_argument("--memory-budget", type=int, default=None, help="MiB for our head; default: the kernel's own")
    parser.add_argument("--model", default="small", choices=sorted(MODELS))
    parser.add_argument("--compile", action="store_true", help="both models through torch.compile")
    parser.add_argument("--adapter", default="none", choices=["none", "lora"], help="lora freezes the head too")
    parser.add_argument("--longest", action="store_true", help="find the longest rows that fit instead")
    parser.add_argument("--limit", type=float, default=None, help="GiB of memory, with --longest on a CPU")
    parser.add_argument("--plot", action="store_true", help="only draw")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement, in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(json.loads(arguments.one))))
        return
    if arguments.adapter == "lora":
        arguments.head = ["frozen"]
    if arguments.longest:
        record("longest", label(arguments), find_longest(arguments))
        return
    if not arguments.plot:
        for rows in arguments.rows or (["demo"] if arguments.data else list(SHAPES)):
            record("step", label(arguments, rows), compare(rows, arguments))
    plot()


def compare(rows: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements on one kind of rows."""
    cases = []
    for head, checkpointing in itertools.product(arguments.head, arguments.checkpointing):
        setting = setting_of(arguments, rows, head, checkpointing)
        theirs = spawn({**setting, "trainer": "trl", "layout": "padded"})
        for layout in arguments.layouts:
            ours = spawn({**setting, "trainer": "ours", "layout": layout})
            case = summary(setting, layout, theirs, ours)
            print(describe(case), flush=True)
            cases.append(case)
    return {"cases": cases, **about_run(arguments)}


def setting_of(arguments: argparse.Namespace, rows: str, head: str, checkpointing: str) -> dict[str, Any]:
    """The setting that both trainers run in."""
    return {
        "rows": rows,
        "data": str(arguments.data) if arguments.data else None,
        "steps": arguments.steps,
        "compile": arguments.compile,
        "warm": 4 if arguments.compile else 1,  # some steps until compiled code serves any length
        "threads": arguments.threads,
        "head": head,
        "checkpointing": checkpointing == "on",
        "model": arguments.model,
        "adapter": arguments.adapter,
        "memory_budget": arguments.memory_budget and arguments.memory_budget * 2**20,
        "pairs": PAIRS,
        "longest": LONGEST,
    }


def find_longest(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens of the longest rows with which a step of one pair fits: doubled until it does not, then halved twice."""
    if not CUDA and arguments.limit is None:
        raise SystemExit("--longest needs --limit GIB on a CPU, where nothing else says what fits")
    cases = []
    for head, checkpointing in itertools.product(arguments.head, arguments.checkpointing):
        setting = setting_of(arguments, "longest", head, checkpointing)
        setting |= {"steps": 1, "pairs": 1, "limit": arguments.limit}
        found = {
            "trl": longest_of(setting | {"trainer": "trl", "layout": "padded"}),
            "ours": longest_of(setting | {"trainer": "ours", "layout": "auto"}),
        }
        print(f"head {head}, checkpointing {checkpointing}: {found['trl']} -> {found['ours']} tokens", flush=True)
        cases.append({"head": head, "checkpointing": checkpointing == "on", **found})
    return {"cases": cases, "limit_gib": arguments.limit, **about_run(arguments)}


def longest_of(setting: dict[str, Any]) -> int:
    """See `find_longest`; 0 where not even `SHORTEST` fits."""

    def fits(tokens: int) -> bool:
        try:
            spawn(setting | {"longest": tokens})
        except RuntimeError as error:
            if any(words in str(error) for words in OUT_OF_MEMORY):
                return False
            raise
        return True

    if not fits(SHORTEST):
        return 0
    low = SHORTEST
    while fits(2 * low):
        low *= 2
    for step in (low // 2, low // 4):
        low += step if fits(low + step) else 0
    return low


def summary(setting: dict[str, Any], layout: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """One line of the result."""
    times = [statistics.median(run["seconds"]) for run in (theirs, ours)]
    totals = [sum(run["seconds"]) for run in (theirs, ours)]
    return {
        "rows": setting["rows"],
        "head": setting["head"],
        "checkpointing": setting["checkpointing"],
        "layout": ours["layout"] if layout == "auto" else layout,
        "trl_seconds": round(times[0], 3),
        "our_seconds": round(times[1], 3),
        "ratio": round(totals[0] / totals[1], 2),
        "token_ideal": round(theirs["tokens"] / theirs["distinct_tokens"], 2),
        "goal": GOALS[setting["head"]] if setting["rows"] == "demo" else None,
        "trl_loss": theirs["losses"],
        "our_loss": ours["losses"],
        "trl_peak_mib": theirs["peak_mib"],
        "our_peak_mib": ours["peak_mib"],
        "trl_profile": theirs["profile"],
        "our_profile": ours["profile"],
    }


def describe(case: dict[str, Any]) -> str:
    """One line for the terminal."""
    goal = f", goal {case['goal']}" if case["goal"] else ""
    return (
        f"{case['rows']}, head {case['head']}, checkpointing {'on' if case['checkpointing'] else 'off'}, "
        f"layout {case['layout']}: {case['trl_seconds']:.2f} s -> {case['our_seconds']:.2f} s per step, "
        f"{case['ratio']:.2f}x (token ideal {case['token_ideal']:.2f}{goal}); "
        f"peak {case['trl_peak_mib']} -> {case['our_peak_mib']} MiB; profile {case['our_profile']}"
    )


def spawn(setting: dict[str, Any]) -> dict[str, Any]:
    """`measured` in a fresh process."""
    environment = {"OMP_NUM_THREADS": str(setting["threads"]), "HF_HUB_OFFLINE": "1"}
    return in_child(__file__, "--one", json.dumps(setting), **environment)


def measured(setting: dict[str, Any]) -> dict[str, Any]:
    """Trains for a few steps and returns their times, losses and a profile of one more step."""
    torch.set_num_threads(setting["threads"])
    if setting.get("limit"):
        resource.setrlimit(resource.RLIMIT_DATA, (int(setting["limit"] * 2**30),) * 2)
    tokenizer, rows = tokenizer_and_rows(setting)
    model = llama(setting)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setting, model, tokenizer, rows, folder)
        clock = Clock(trainer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": clock.seconds[setting["warm"] : setting["warm"] + setting["steps"]],
        "losses": losses[:3],
        "peak_mib": peak_bytes() // 2**20,
        "profile": clock.shares,
        "layout": getattr(getattr(trainer.data_collator, "layout", None), "name", "padded"),
        **clock.token_counts(),
    }


def make_trainer(setting: dict[str, Any], model: Any, tokenizer: Any, rows: list[Row], folder: str) -> Any:
    """TRL's trainer or ours, with the same arguments."""
    from datasets import Dataset

    if setting["trainer"] == "trl":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        own: dict[str, Any] = {}
    else:
        from orpo_plugins import ORPOConfig, ORPOTrainer

        own = {name: setting[name] for name in ("layout", "memory_budget")} | {"nll_normalization": "microbatch"}
    return ORPOTrainer(
        model=model,
        args=ORPOConfig(**training_arguments(setting, folder), **own),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora() if setting["adapter"] == "lora" else None,
    )


def training_arguments(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    """What both trainers take."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting["pairs"],
        "max_length": setting["longest"],
        "max_steps": setting["steps"] + setting["warm"] + 1,
        "torch_compile": setting["compile"],
        "learning_rate": 1e-4,
        "gradient_checkpointing": setting["checkpointing"],
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not CUDA,
        "dataloader_drop_last": True,
        "bf16": CUDA,
        "disable_tqdm": True,
        "seed": 0,
    }


def lora() -> Any:
    """LoRA on all linear layers but the head."""
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def about_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What stands beside the cases."""
    return {**about(*PACKAGES), "steps": arguments.steps, "threads": arguments.threads}


def label(arguments: argparse.Namespace, rows: str = "half prompt, half answer") -> str:
    """What was measured, as an entry of the results."""
    model = "" if arguments.model == "small" else f", {arguments.model}"
    budget = "" if arguments.memory_budget is None else f", {arguments.memory_budget} MiB for the head"
    adapter = "" if arguments.adapter == "none" else f", {arguments.adapter}"
    return rows + model + adapter + budget + (", compiled" if arguments.compile else "")


def record(kind: str, name: str, result: dict[str, Any]) -> None:
    """Adds one entry to the file of the TRL version at hand."""
    stem = f"{kind}-{'gpu-' if CUDA else ''}trl{result['versions']['trl']}"
    path = RESULTS / f"{stem}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    save(stem, {**known, name: result})


def plot() -> None:
    """docs/images/step.png from all result files; nothing where matplotlib is absent."""
    plt = pyplot()
    if plt is None:
        return
    bars = list(_bars())
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(bars)))
    axes.barh([label for label, _, _ in bars], [ratio for _, ratio, _ in bars], color="tab:blue")
    for index, (_, ratio, ideal) in enumerate(bars):
        axes.text(ratio, index, f" {ratio:.2f}", va="center")
        axes.plot([ideal, ideal], [index - 0.4, index + 0.4], color="black")
    axes.axvline(1, color="tab:gray", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("times cheaper than TRL (black: tokens only)")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "step.png", dpi=120, bbox_inches="tight")


def _bars() -> Iterator[tuple[str, float, float]]:
    for path in sorted(RESULTS.glob("step-trl*.json")):
        for rows, result in json.loads(path.read_text()).items():
            for case in result["cases"]:
                checkpointing = "checkpointing" if case["checkpointing"] else "no checkpointing"
                label = (
                    f"{rows}, {case['head']} head, {checkpointing}, {case['layout']} (TRL {result['versions']['trl']})"
                )
                yield label, case["ratio"], case["token_ideal"]


if __name__ == "__main__":
    main()
