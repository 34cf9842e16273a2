"""Time and peak memory of the ORPO head, against every peer that is installed.

    python benchmarks/head.py                    # the CPU or GPU table, with progress; JSON and plot when done
    python benchmarks/head.py --curve            # time against memory_budget instead
    python benchmarks/head.py --accuracy         # distance from float64 instead

Each variant runs in a fresh process.  Time: the least over the repeats, on a CPU process-CPU seconds divided by the
threads, on a GPU elapsed seconds.  Memory: peak above the inputs, returned gradients included; on a CPU resident
memory (Linux), on a GPU what the allocator handed out.  A first call, not counted, compiles what compiles.
"""

import argparse
import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch
from head_peers import PEERS, VARIANTS, Peer, live_targets, ours_with_budget
from measure import CUDA, RESULTS, Meter, about, in_child, now, pyplot, save
from torch.utils import benchmark

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "triton")


def main() -> None:
    """The parent process: one child per cell and variant, then the table."""
    arguments = parse()
    if arguments.child:
        print(json.dumps(measured(json.loads(arguments.child))))
        return
    cells = list(plan(arguments))
    rows = earlier(arguments, set(map(_cell, cells))) if arguments.keep else []
    for number, (_, group) in enumerate(itertools.groupby(cells, _cell), 1):
        print(f"cell {number} of {len(set(map(_cell, cells)))}", flush=True)
        for found in in_turns(list(group), arguments):
            write(arguments, rows + found)
        rows += found
    print(table(rows))
    plot(arguments, rows)


def in_turns(waiting: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """After each measurement the best row so far of each variant of one cell."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for cell in waiting:
            started = time.monotonic()
            row = cell | run_child(cell, arguments.timeout)
            print(f"  {describe(row)}  ({time.monotonic() - started:.0f} s)", flush=True)
            found[cell["peer"]] = min(found.get(cell["peer"], row), row, key=_seconds)
            yield list(found.values())
        # The next round measures what may be the fastest once more.
        fastest = min(map(_seconds, found.values()))
        waiting = [cell for cell in waiting if _seconds(found[cell["peer"]]) < 1.5 * fastest]


def _seconds(row: dict[str, Any]) -> float:
    return float(row.get("seconds", float("inf")))


def earlier(arguments: argparse.Namespace, again: set[str]) -> list[dict[str, Any]]:
    """The rows of the results file, without the cells that are measured again."""
    known = json.loads((RESULTS / f"{arguments.name}.json").read_text())
    return [row for row in known["rows"] if _cell(row) not in again]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [128256, 151936, 262144] if CUDA else [32000, 128256]
    parser.add_argument("--vocabulary", type=int, nargs="+", default=sizes)
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["bf16"] if CUDA else ["fp32", "bf16"])
    parser.add_argument("--head", nargs="+", choices=["trainable", "frozen"], default=["trainable", "frozen"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 8] if CUDA else [2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096] if CUDA else [512])
    parser.add_argument("--hidden", type=int, default=4096 if CUDA else 512)
    parser.add_argument("--peers", nargs="+", default=None, choices=[*PEERS, *VARIANTS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep the other cells of the results")
    parser.add_argument("--rounds", type=int, default=1, help="times to measure whatever may be the fastest, in turns")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds after which nothing is repeated")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per variant")
    parser.add_argument("--curve", action="store_true", help="time against memory_budget, ours alone")
    parser.add_argument("--accuracy", action="store_true", help="distance from float64 on a small case")
    parser.add_argument("--name", default=None, help="stem of the files under benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.accuracy:
        arguments.vocabulary, arguments.pairs, arguments.tokens = [8191], [2], [128]
    if arguments.peers is None:
        arguments.peers = [*PEERS, *VARIANTS] if arguments.accuracy else list(PEERS)
    if arguments.curve:
        arguments.head = ["trainable"]
    if arguments.name is None:
        kind = "curve" if arguments.curve else "accuracy" if arguments.accuracy else "gpu" if CUDA else "cpu"
        arguments.name = f"head_{kind}"
    return arguments


def plan(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every cell of the table with every variant."""
    axes = (arguments.head, arguments.vocabulary, arguments.dtype, arguments.pairs, arguments.tokens)
    for head, vocabulary, dtype, pairs, tokens in itertools.product(*axes):
        if vocabulary != arguments.vocabulary[0] and len(arguments.vocabulary) > 2 and tokens != arguments.tokens[0]:
            continue  # further vocabularies with short rows alone
        cell = {
            "head": head,
            "vocabulary": vocabulary,
            "dtype": dtype,
            "pairs": pairs,
            "tokens": tokens,
            "hidden": arguments.hidden,
            "repeats": arguments.repeats,
            "patience": arguments.patience,
            "accuracy": arguments.accuracy,
        }
        if arguments.curve:
            targets = 3 * pairs * tokens // 2
            everything = int(1.05 * targets * vocabulary * DTYPES[dtype].itemsize) + 40 * 2**20
            yield cell | {"peer": "ours"}
            for budget in (0, *(int(share * everything) for share in (0.25, 0.5, 0.75, 1.0))):
                yield cell | {"peer": f"ours, budget {budget / 2**20:.0f} MiB", "budget": budget}
        else:
            yield from (cell | {"peer": peer} for peer in arguments.peers)


def run_child(cell: dict[str, Any], timeout: float) -> dict[str, Any]:
    """What `measured` returns in a process of its own, or why there is nothing."""
    try:
        return in_child(__file__, "--child", json.dumps(cell), timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    except RuntimeError as error:
        return {"error": str(error).splitlines()[-1][:200]}


def measured(cell: dict[str, Any]) -> dict[str, Any]:
    """One variant of one cell."""
    peer = ours_with_budget(cell["budget"]) if "budget" in cell else (PEERS | VARIANTS)[cell["peer"]]
    device = torch.device("cuda" if CUDA else "cpu")
    hidden, weight, labels, nll_labels = inputs(cell, device)
    if cell["accuracy"]:
        return distances(peer, hidden, weight, labels, nll_labels)
    step(peer, hidden, weight, labels, nll_labels)
    meter, memory, seconds = Meter(), 0, []
    for repeat in range(cell["repeats"]):
        hidden.grad = weight.grad = None
        meter.start()
        step(peer, hidden, weight, labels, nll_labels)
        elapsed, peak = meter.stop()
        seconds.append(elapsed)
        memory = peak if repeat == 0 else memory
        if sum(seconds) > cell["patience"]:
            break
    found = {"seconds": min(seconds), "median_seconds": sorted(seconds)[len(seconds) // 2], "peak_mib": memory / 2**20}
    if cell["peer"].startswith("ours"):
        live = int(live_targets(labels, nll_labels)[0].sum())
        found["of_matrix_rate"] = necessary_operations(cell, live) / found["seconds"] / matrix_rate(cell, device)
    return found


def necessary_operations(cell: dict[str, Any], live: int) -> float:
    """Floating-point operations of the least products that give the gradients asked for: 3, or 2 for a frozen head."""
    return (3 if cell["head"] == "trainable" else 2) * 2.0 * live * cell["vocabulary"] * cell["hidden"]


def matrix_rate(cell: dict[str, Any], device: torch.device) -> float:
    """Operations per second (and thread) of the fastest large product of this dtype."""
    from orpo_plugins.kernels.products import times_transposed

    side, threads = 8192 if CUDA else 1024, torch.get_num_threads()
    left, right = (torch.randn(side, side, device=device, dtype=DTYPES[cell["dtype"]]) for _ in range(2))
    timers = [
        benchmark.Timer("product()", globals={"product": product}, timer=now, num_threads=threads)
        for product in (lambda: left @ right.T, lambda: times_transposed(left, right))
    ]
    best = min(min(timer.blocked_autorange(min_run_time=0.5).times) for timer in timers)
    return 2.0 * side**3 / best * (1 if CUDA else threads)


def inputs(cell: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Rows of `tokens` positions, the first half a prompt, the last one predicting nothing; NLL over the sequence.

    Logits have a standard deviation of about 3 with the target raised, as in a trained model.
    """
    torch.manual_seed(0)
    rows, tokens, width, vocabulary = 2 * cell["pairs"], cell["tokens"], cell["hidden"], cell["vocabulary"]
    dtype = DTYPES[cell["dtype"]]
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype).mul_(3 * width**-0.5)
    labels = torch.randint(vocabulary, (rows, tokens), device=device)
    hidden = torch.randn(rows, tokens, width, device=device, dtype=dtype)
    hidden += weight[labels]
    labels[:, -1] = -100
    nll_labels = labels[: cell["pairs"]].clone()
    labels[:, : tokens // 2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(cell["head"] == "trainable"), labels, nll_labels


def step(peer: Peer, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, nll: torch.Tensor) -> float:
    """One forward and backward."""
    loss = peer(hidden, weight, labels, nll)
    loss.backward()
    return float(loss.detach())


def distances(
    peer: Peer, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, nll: torch.Tensor
) -> dict[str, Any]:
    """Relative distance (Euclidean norm) of loss and gradients from float64 arithmetic on the same inputs."""
    from orpo_plugins import linear_orpo_loss

    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (hidden, weight)]
    expected = linear_orpo_loss(exact[0], exact[1], labels, nll_labels=nll, kernel="reference").loss
    expected.backward()
    loss = step(peer, hidden, weight, labels, nll)
    result: dict[str, Any] = {"loss_error": abs(loss / float(expected.detach()) - 1)}
    for name, tensor, reference in (("hidden", hidden, exact[0]), ("weight", weight, exact[1])):
        if tensor.grad is not None and reference.grad is not None:
            difference = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
            result[f"{name}_gradient_error"] = float(difference)
    return result


def describe(row: dict[str, Any]) -> str:
    """One variant in one line."""
    where = f"{row['head']}, {row['vocabulary']} {row['dtype']}, {row['pairs']} x {row['tokens']}, {row['peer']}"
    if "error" in row:
        return f"{where}: {row['error']}"
    if "seconds" in row:
        share = f", {row['of_matrix_rate']:.0%} of the matrix rate" if "of_matrix_rate" in row else ""
        return f"{where}: {row['seconds']:.4g} s, {row['peak_mib']:.0f} MiB{share}"
    return f"{where}: " + ", ".join(f"{key} {value:.1e}" for key, value in row.items() if key.endswith("_error"))


def table(rows: list[dict[str, Any]]) -> str:
    """Peers down, cells across; "seconds / MiB"."""
    cells = list(dict.fromkeys(_cell(row) for row in rows))
    lines = ["| | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        found = {_cell(row): row for row in rows if row["peer"] == peer}
        lines.append(f"| {peer} | " + " | ".join(_entry(found.get(cell)) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['head']} {row['vocabulary'] // 1000}k {row['dtype']} {row['pairs']} x {row['tokens']}"


def _entry(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "seconds" in row:
        return f"{row['seconds']:.3g} / {row['peak_mib']:.0f}"
    errors = [f"{value:.1e}" for key, value in row.items() if key.endswith("_error")]
    return " / ".join(errors) or "failed"


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The results so far, after every variant."""
    save(arguments.name, {**about(*PACKAGES), "rows": rows})


def plot(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Memory against time, one panel per cell."""
    rows = [row for row in rows if "seconds" in row]
    plt, cells = pyplot(), list(dict.fromkeys(_cell(row) for row in rows))
    if plt is None or not cells:
        return
    across = min(4, len(cells))
    down = -(-len(cells) // across)
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 3.2 * down), squeeze=False, layout="constrained")
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    for axis, cell in zip(axes.flat, cells, strict=False):
        for row in (row for row in rows if _cell(row) == cell):
            marker = "*" if row["peer"].startswith("ours") else "o"
            color = f"C{peers.index(row['peer'])}"
            axis.plot(row["seconds"], row["peak_mib"], marker, color=color, markersize=9, label=row["peer"])
        axis.set(title=cell, xlabel="seconds", ylabel="peak MiB above inputs", xscale="log", yscale="log")
        axis.title.set_fontsize(9)
    entries = {
        name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(RESULTS / f"{arguments.name}.png", dpi=110)


if __name__ == "__main__":
    main()
