"""Writes the figures of benchmarks/results/*.json into the documents that quote them.

    python benchmarks/quote.py           # rewrites the blocks
    python benchmarks/quote.py --check   # exits 1 where a document says something else (a test calls this)

A block stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; NAME is a function below.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def results(name: str) -> Any:
    """One results file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(result: dict[str, Any]) -> str:
    """The line that says where figures come from."""
    return f"\n`{result['command']}` on {result['machine']}.\n"


def politeness() -> str:
    """The run on the politeness pairs."""
    result = results("politeness")
    names = ("nll_loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")
    rows = [[f"`{n}`", f"{result['before'][n]:.3f}", f"{result['after'][n]:.3f}"] for n in names]
    return (
        table(["on 100 held-out pairs", "before", "after"], rows)
        + f"\n{result['cpu_minutes']:.1f} CPU minutes, {result['parameters'] / 1e6:.2f} million parameters.\n"
        + source(result)
    )


def paper_observation() -> str:
    """The paper's observation: before, and after training with each lambda, from both starts."""
    result = results("paper_observation")
    text = ""
    for start, found in result["held_out"].items():
        before = next(iter(found.values()))[0]
        entries = [("before", before), *((f"λ = {beta}", points[-1]) for beta, points in found.items())]
        names = ("logps/chosen", "logps/rejected", "log_odds_chosen", "rewards/accuracies")
        rows = [
            [label, *(f"{round(entry[name], 2) + 0.0:.2f}" for name in names), f"{entry['logps/rejected/spread']:.2f}"]
            for label, entry in entries
        ]
        header = [start, "chosen", "rejected", "log odds ratio", "accuracy", "spread of rejected"]
        text += table(header, rows) + "\n"
    return (
        text
        + f"Mean log-probability per answer token on 100 held-out pairs, means over {result['seeds']} seeds, and the "
        + f"largest distance of a seed from the mean. {result['cpu_minutes']:.1f} CPU minutes in all.\n"
        + source(result)
    )


def head() -> str:
    """CPU seconds and MiB of the head alone, by peer and cell."""
    return _cells(results("head_cpu"))


def head_products() -> str:
    """The same for the two that multiply bf16 operands in fp32, beside our default."""
    return _cells(results("head_fp32_products"))


def head_accuracy() -> str:
    """Distances of loss and gradients from float64, by peer and dtype, with a trainable head."""
    rows = [row for row in results("head_accuracy")["rows"] if row["head"] == "trainable"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figures: dict[str, dict[str, str]] = {}
    for row in rows:
        errors = (row.get(f"{name}_error", math.nan) for name in ("loss", "hidden_gradient", "weight_gradient"))
        figures.setdefault(row["peer"], {})[row["dtype"]] = " / ".join(f"{error:.2e}" for error in errors)
    lines = [[peer, *(found.get(dtype, "") for dtype in dtypes)] for peer, found in figures.items()]
    return table(["loss / hidden states / weight", *dtypes], lines) + source(results("head_accuracy"))


def _cells(result: dict[str, Any]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        name = f"{row['head']} {row['vocabulary'] // 1000}k {row['dtype']}"
        figure = f"{row['seconds']:.3g} / {row['peak_mib']:.0f}" if "seconds" in row else "failed"
        cells.setdefault(name, {})[row["peer"]] = figure
    peers = list(dict.fromkeys(row["peer"] for row in result["rows"]))
    rows = [[name, *(figures.get(peer, "") for peer in peers)] for name, figures in cells.items()]
    return (
        "CPU seconds / MiB above the inputs, returned gradients included:\n\n"
        + table(["", *peers], rows)
        + '\n"failed": not done within the time limit; empty: not measured.\n'
        + source(result)
    )


def head_curve() -> str:
    """Time against memory_budget, ours with a trainable head."""
    result = results("head_curve")
    rows = []
    for row in result["rows"]:
        budget = f"{row['budget'] / 2**20:.0f} MiB" if "budget" in row else "default"
        cell = f"{row['vocabulary'] // 1000}k {row['dtype']}"
        rows.append([cell, budget, f"{row['seconds']:.3g}", f"{row['peak_mib']:.0f}"])
    return table(["trainable", "`memory_budget`", "CPU s", "MiB, gradients included"], rows) + source(result)


def head_growth() -> str:
    """Memory at both ends of each axis, by peer and head."""
    result = results("head_growth")
    found = {(r["head"], r["axis"], r["peer"], r[r["axis"]]): r for r in result["rows"] if "error" not in r}
    sizes = {axis: sorted({r[axis] for r in result["rows"] if r["axis"] == axis}) for axis in ("tokens", "vocabulary")}
    ends = [(axis, size) for axis, known in sizes.items() for size in (known[0], known[-1])]

    def figure(kind: str, peer: str, axis: str, size: int) -> str:
        row = found.get((kind, axis, peer, size))
        return "" if row is None else f"{'~' if row['analytic'] else ''}{max(row['beyond_mib'], 0):.0f}"

    rows = [
        [f"{kind}: {peer}", *(figure(kind, peer, axis, size) for axis, size in ends)]
        for kind in dict.fromkeys(r["head"] for r in result["rows"])
        for peer in dict.fromkeys(r["peer"] for r in result["rows"])
    ]
    header = ["MiB", *(f"{size:,} {'entries' if axis == 'vocabulary' else axis}" for axis, size in ends)]
    return table(header, rows) + "\n~: in proportion from the largest size that was measured.\n" + source(result)


def step() -> str:
    """Ratio of CPU time per training step, TRL's over ours, by rows and setting."""
    rows, last = [], {}
    for path in sorted(RESULTS.glob("step-trl*.json")):
        for name, last in json.loads(path.read_text()).items():
            rows += [
                [
                    f"TRL {last['versions']['trl']}",
                    name,
                    case["layout"],
                    f"{case['head']}, checkpointing {'on' if case['checkpointing'] else 'off'}",
                    f"{case['trl_seconds']:.1f} / {case['our_seconds']:.1f}",
                    f"**{case['ratio']:.2f}**",
                    f"{case['token_ideal']:.2f}",
                    f"{case['trl_peak_mib']} / {case['our_peak_mib']}",
                ]
                for case in last["cases"]
            ]
    header = [
        "against",
        "rows",
        "layout",
        "head",
        "CPU s, TRL / ours",
        "ratio",
        "by tokens alone",
        "peak MiB, TRL / ours",
    ]
    return table(header, rows) + source({**last, "command": "python benchmarks/step.py"})


BLOCKS: dict[str, Callable[[], str]] = {
    "head": head,
    "head-curve": head_curve,
    "head-accuracy": head_accuracy,
    "head-products": head_products,
    "head-growth": head_growth,
    "paper-observation": paper_observation,
    "politeness": politeness,
    "step": step,
}


def rendered(text: str) -> str:
    """A document with its blocks as the results say."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[3], text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path in DOCUMENTS if rendered(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{'differs' if check else 'rewritten'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(rendered(path.read_text()))
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
