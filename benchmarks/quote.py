"""Writes the figures of benchmarks/results/*.json into the documents that quote them.

    python benchmarks/quote.py           # rewrites the blocks
    python benchmarks/quote.py --check   # exits 1 where a document says something else (a test calls this)

A block stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; NAME is a function below.
"""

import argparse
import json
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
        + f"\n{result['cpu_minutes']:.1f} CPU minutes, {result['parameters'] / 1e6:.2f} million parameters from scratch.\n"
        + source(result)
    )


BLOCKS: dict[str, Callable[[], str]] = {"politeness": politeness}


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
