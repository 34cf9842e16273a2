"""The tables of README and docs that cog fills in from benchmarks/results and from the options' declarations.

python benchmarks/figures.py            # rewrites what stands between the marks
python benchmarks/figures.py --check    # fails where a page says something else (a test runs this)
"""

import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = [HERE.parent / page for page in ("README.md", "docs/benchmarks.md", "docs/options.md", "docs/support.md")]


def results(name: str) -> Any:
    """One results file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: Sequence[str], rows: Iterable[Sequence[object]], result: dict[str, Any] | None = None) -> None:
    """Prints a Markdown table, and under it the command and the machine that its figures come from."""
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(map(str, row)), "|")
    if result:
        print(f"\n`{result['command']}` on {result['machine']}.")


def readme() -> None:
    """What a training step takes, in time and memory, and what its head takes."""
    demo = results("step-trl1.16.0")["demo"]
    step = next(case for case in demo["cases"] if case["head"] == "trainable" and not case["checkpointing"])
    heads = {row["peer"]: row for row in results("head_cpu")["rows"] if _cell(row) == "frozen 128k bf16"}
    ours, eager = heads["ours"], heads["eager (TRL)"]
    rows = [
        ["CPU time of a training step on real rows", f"{step['trl_seconds']:.1f} s", f"{step['our_seconds']:.1f} s"],
        ["its peak memory", f"{step['trl_peak_mib']:,} MiB", f"{step['our_peak_mib']:,} MiB"],
        [
            "memory of a frozen bf16 head, 128k vocabulary",
            f"{eager['peak_mib']:,.0f} MiB",
            f"{ours['peak_mib']:.0f} MiB",
        ],
    ]
    table(["", "TRL 1.16.0", "orpo-plugins"], rows)
    print(f"\nMachine: {demo['machine']}, fp32 step, one thread.")


def step() -> None:
    """CPU time and memory per training step, TRL's and ours, by rows and setting; of each kind of rows the newest."""
    rows, newest = [], {**results("step-trl1.9.0"), **results("step-trl1.16.0")}
    for name, last in newest.items():
        for case in last["cases"]:
            head = f"{case['head']}{', checkpointing' if case['checkpointing'] else ''}"
            seconds, mib = (f"{case[f'trl_{x}']:.4g} / {case[f'our_{x}']:.4g}" for x in ("seconds", "peak_mib"))
            ratios = [f"**{case['ratio']:.2f}**", f"{case['token_ideal']:.2f}"]
            rows.append([last["versions"]["trl"], name, case["layout"], head, seconds, *ratios, mib])
    header = ["TRL", "rows", "layout", "head", "CPU s, TRL / ours", "ratio", "by tokens only", "MiB, TRL / ours"]
    table(header, rows, {**last, "command": "python benchmarks/step.py"})


def head(name: str = "head_cpu") -> None:
    """CPU seconds and MiB of the head alone, by peer."""
    result, cells = results(name), defaultdict(dict)
    for row in result["rows"]:
        figure = f"{row['seconds']:.3g} / {row['peak_mib']:.0f}" if "seconds" in row else "failed"
        cells[_cell(row)][row["peer"]] = figure
    peers = list(dict.fromkeys(row["peer"] for row in result["rows"]))
    rows = [[cell, *(figures.get(peer, "") for peer in peers)] for cell, figures in cells.items()]
    table(["CPU s / MiB", *peers], rows, result)


def head_accuracy() -> None:
    """Distances of loss and gradients from float64, by peer and dtype, with a trainable head."""
    result, figures = results("head_accuracy"), defaultdict(dict)
    for row in (row for row in result["rows"] if row["head"] == "trainable"):
        errors = (row[f"{name}_error"] for name in ("loss", "hidden_gradient", "weight_gradient"))
        figures[row["peer"]][row["dtype"]] = " / ".join(f"{error:.2e}" for error in errors)
    rows = [[peer, *(found.get(dtype, "") for dtype in ("fp32", "bf16"))] for peer, found in figures.items()]
    table(["loss / hidden states / weight", "fp32", "bf16"], rows, result)


def head_growth() -> None:
    """Memory at both ends of each axis, by peer and head."""
    result, cells, sizes = results("head_growth"), defaultdict(dict), defaultdict(set)
    for row in (row for row in result["rows"] if "error" not in row):
        size = row["axis"], row[row["axis"]]
        sizes[size[0]].add(size[1])
        figure = f"{'~' if row['analytic'] else ''}{max(row['beyond_mib'], 0):.0f}"
        cells[f"{row['head']}: {row['peer']}"][size] = figure
    ends = [(axis, end(known)) for axis, known in sizes.items() for end in (min, max)]
    header = ["MiB", *(f"{size:,} {'entries' if axis == 'vocabulary' else axis}" for axis, size in ends)]
    table(header, ([name, *(found.get(end, "") for end in ends)] for name, found in cells.items()), result)


def politeness() -> None:
    """The run on the politeness pairs."""
    result = results("politeness")
    names = ("nll_loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")
    rows = ([f"`{name}`", f"{result['before'][name]:.3f}", f"{result['after'][name]:.3f}"] for name in names)
    table(["on 100 held-out pairs", "before", "after"], rows, result)


def answer_end() -> None:
    """What a second EOS changes on held-out pairs of a chat model."""
    result = results("answer_end")
    names = {
        "chosen_logps": "mean log-probability, chosen",
        "rejected_logps": "mean log-probability, rejected",
        "log_odds": "log odds ratio",
        "accuracy": "accuracy",
        "chosen_tokens": "tokens of a chosen answer",
    }
    rows = ([text, f"{result['repeated'][n]:.2f}", f"{result['first'][n]:.2f}"] for n, text in names.items())
    table([f"on {result['rows']} held-out pairs", "`repeat_eos=True` (TRL)", "default"], rows, result)
    print(f"\n{result['pairs_that_change_sides']} of the pairs change sides.")


def paper_observation() -> None:
    """Before, and after training with each lambda, from both starts."""
    result = results("paper_observation")
    names = ("logps/chosen", "logps/rejected", "log_odds_chosen", "rewards/accuracies", "logps/rejected/spread")
    rows = []
    for start, found in result["held_out"].items():
        entries = [("before", next(iter(found.values()))[0]), *((f"λ = {b}", p[-1]) for b, p in found.items())]
        rows += [[start, label, *(f"{round(at[name], 2) + 0.0:.2f}" for name in names)] for label, at in entries]
    header = ["start", "", "chosen", "rejected", "log odds ratio", "accuracy", "spread of rejected"]
    table(header, rows, result)


def families(version: str) -> None:
    """Which model families share prompts, and why the others are padded."""
    groups = defaultdict(list)
    for row in results(f"families-{version}"):
        verdict, _, reason = re.sub(r"because |\(layer 0\)", "", row["verdict"]).replace(":", ",").partition(", ")
        reason = re.sub(r"^\w*(LM|Model|Attention|Layer|Generation)\w*", "it", reason) or "equal to padded"
        groups[reason, "shared" if verdict == "equal" else verdict].append(row["family"])
    rows = sorted(groups.items(), key=lambda group: -len(group[1]))
    header = ["`auto` takes", "because", "families of transformers " + version]
    table(header, ([layout, reason, f"{len(names)}: {', '.join(names)}"] for (reason, layout), names in rows))


def options() -> None:
    """Every option: its key in Axolotl's YAML, its default and its help."""
    from orpo_plugins.integrations.axolotl_arguments import KEYS
    from orpo_plugins.options import ORPOFields

    theirs = {"beta": "orpo_alpha", "max_length": "sequence_len", "dataset_num_proc": "dataset_num_proc"}
    rows = []
    for field in sorted(dataclasses.fields(ORPOFields), key=lambda field: field.name):
        key = theirs.get(field.name, f"orpo_{field.name}")
        known = key in KEYS or field.name in theirs
        rows.append([f"`{field.name}`", f"`{key}`" * known, f"`{field.default}`", field.metadata["help"]])
    table(["option", "Axolotl's key", "default", "meaning"], rows)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['head']} {row['vocabulary'] // 1000}k {row['dtype']}"


if __name__ == "__main__":
    from cogapp import Cog

    mode = sys.argv[1:] or ["-r"]
    sys.exit(Cog().main(["cog", *mode, "-P", "-I", str(HERE), "-p", "from figures import *", *map(str, PAGES)]))
