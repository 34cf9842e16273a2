"""How the head's peak memory grows with tokens and with the vocabulary, for us and the peers.

    python benchmarks/head_growth.py             # with progress; JSON and plot under benchmarks/results

One pair in bf16, H 512; half of each sequence is a prompt.  Memory: peak above the inputs and the gradients that are
returned, in a fresh process each (see head.py).  Where the next size would pass --limit the figure is not measured but
continued in proportion from the largest that was, drawn dashed and marked "analytic" in the JSON.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import head
from measure import CUDA, RESULTS, pyplot

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
VOCABULARIES = (32000, 64000, 128256, 262144)
PEERS = ("ours", "cut-cross-entropy", "torch chunked", "Liger compiled", "TRL chunked", "eager (TRL)")


def main() -> None:
    """Every peer along both axes, for both heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--limit", type=float, default=6.0, help="GiB that one measurement may take")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per measurement")
    parser.add_argument("--hidden", type=int, default=4096 if CUDA else 512)
    parser.add_argument("--name", default="head_growth", help="stem of the files under benchmarks/results")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for series in all_series(arguments):
        for row in measured(series, arguments):
            rows.append(row)
            print(describe(row), flush=True)
            head.write(arguments, rows)
    plot(rows, arguments.name)


def all_series(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Cells of growing size, one list per peer, head and axis."""
    common = {"dtype": "bf16", "pairs": 1, "hidden": arguments.hidden}
    common |= {"repeats": 1, "patience": 0.0, "accuracy": False}
    for kind in ("frozen", "trainable"):
        for peer in arguments.peers:
            base = common | {"head": kind, "peer": peer}
            yield [base | {"axis": "tokens", "tokens": tokens, "vocabulary": VOCABULARIES[0]} for tokens in TOKENS]
            yield [base | {"axis": "vocabulary", "tokens": TOKENS[0], "vocabulary": size} for size in VOCABULARIES]


def measured(series: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The series with "beyond_mib" in each row, or "error" in the last."""
    previous: dict[str, Any] | None = None
    for cell in series:
        if previous is not None and (previous["analytic"] or _scaled(previous, cell) > arguments.limit * 1024):
            row = cell | {"beyond_mib": _scaled(previous, cell), "analytic": True}
        else:
            began = time.monotonic()
            row = cell | head.run_child(cell, arguments.timeout)
            row["wall_seconds"] = round(time.monotonic() - began, 1)
            if "error" in row:
                yield row
                return
            row |= {"beyond_mib": row["peak_mib"] - returned_mib(cell), "analytic": False}
        yield row
        previous = row


def _scaled(previous: dict[str, Any], cell: dict[str, Any]) -> float:
    axis = cell["axis"]
    return float(previous["beyond_mib"]) * cell[axis] / previous[axis]


def returned_mib(cell: dict[str, Any]) -> float:
    """The gradients that every variant has to return."""
    rows = 2 * cell["pairs"] * cell["tokens"] + (cell["vocabulary"] if cell["head"] == "trainable" else 0)
    return float(rows * cell["hidden"] * head.DTYPES[cell["dtype"]].itemsize / 2**20)


def describe(row: dict[str, Any]) -> str:
    """One line."""
    where = f"{row['head']}, {row['tokens']} tokens, vocabulary {row['vocabulary']}, {row['peer']}"
    if "error" in row:
        return f"{where}: {row['error']}"
    return f"{where}: {row['beyond_mib']:.0f} MiB{' (in proportion)' if row['analytic'] else ''}"


def plot(rows: list[dict[str, Any]], name: str) -> None:
    """Four panels: both heads, both axes."""
    plt = pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    for (kind, axis), panel in zip(
        [(kind, axis) for kind in ("frozen", "trainable") for axis in ("tokens", "vocabulary")],
        panels.flat,
        strict=True,
    ):
        for number, peer in enumerate(peers):
            found = [r for r in rows if (r["head"], r["axis"], r["peer"]) == (kind, axis, peer) and "error" not in r]
            known = [row for row in found if not row["analytic"]]
            beyond = known[-1:] + [row for row in found if row["analytic"]]
            for part, style in ((known, "o-"), (beyond, "--")):
                label = peer if style == "o-" else None
                x, y = [row[axis] for row in part], [max(row["beyond_mib"], 1.0) for row in part]
                panel.plot(x, y, style, color=f"C{number}", label=label, markersize=4)
        panel.set(
            title=f"{kind} head", xlabel=axis, ylabel="MiB beyond inputs and gradients", xscale="log", yscale="log"
        )
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
