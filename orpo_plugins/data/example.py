"""One pair as it is trained, as text: its prompt and both answers, and which parts of them have labels.

The text shows errors that no count of rows shows: a prompt that is there twice or is missing, a missing template, an
answer that stops in the middle.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from orpo_plugins.hooks.types import Pair, TokenSequence
from orpo_plugins.targets import IGNORE_INDEX, prompt_length

_LONGEST = 600
"""The most characters of a text that are shown.  Of a longer text, its beginning and its end."""


def example_text(pair: Pair, tokenizer: Any, *, nll_over: str = "sequence") -> str:
    """The decoded pair: one line for the prompt, and one for each answer.  Tokens with labels are inside [[ ]].

    Args:
        pair: as a layout gets it.
        tokenizer: anything with `decode`.
        nll_over: "sequence" or "completion" (the prompt does not count in the NLL).
    """
    counted = "the prompt and the chosen answer" if nll_over == "sequence" else "the chosen answer"
    meaning = f"Tokens in [[...]] count in the answer's log-probability. The NLL counts {counted}"
    lines = [f"one pair as it is trained. {meaning}:"]
    chosen, rejected = pair.chosen, pair.rejected
    start = prompt_length(chosen.labels)
    lines.append(_line("prompt", chosen, 0, start, tokenizer))
    lines.append(_line("chosen", chosen, start, len(chosen.labels), tokenizer))
    if not rejected.input_ids:
        return "\n  ".join([*lines, "rejected: none, trained with the NLL alone"])
    own_start = prompt_length(rejected.labels)
    if rejected.input_ids[:own_start] != chosen.input_ids[:start]:
        lines.append(_line("prompt of the rejected answer", rejected, 0, own_start, tokenizer))
    lines.append(_line("rejected", rejected, own_start, len(rejected.labels), tokenizer))
    return "\n  ".join(lines)


def _line(name: str, sequence: TokenSequence, start: int, end: int, tokenizer: Any) -> str:
    text = "".join(_runs(sequence.input_ids[start:end], sequence.labels[start:end], tokenizer))
    if len(text) > _LONGEST:
        left_out = len(text) - _LONGEST
        text = f"{text[: _LONGEST // 2]} ... {left_out} characters ... {text[-_LONGEST // 2 :]}"
    shown = text.replace("\n", "\\n").replace("\r", "\\r")
    return f"{name} ({end - start} tokens): {shown}"


def _runs(ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[str]:
    """The text of each run of tokens that all have labels, or that all have none."""
    for labelled, run in itertools.groupby(zip(ids, labels, strict=True), lambda item: item[1] != IGNORE_INDEX):
        text = tokenizer.decode([token for token, _ in run])
        yield f"[[{text}]]" if labelled else text
