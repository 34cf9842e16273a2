"""What became of the rows of a dataset, counted and in words."""

from collections.abc import Mapping
from dataclasses import dataclass, field

FLAGS = (
    "prompt_truncated",
    "chosen_truncated",
    "rejected_truncated",
    "repaired",
    "restated",
    "sft_only",
    "weighted",
    "with_margin",
    "strings_joined",
    "strings_templated",
)
"""What is counted of each row that became a pair, by the names of `BuiltPair`."""


@dataclass(kw_only=True)
class PreparationReport:
    """What became of a dataset's rows."""

    name: str = "train"
    """How messages call the dataset."""
    rows: int = 0
    """Rows read."""
    kept: int = 0
    """Rows that became pairs."""
    prompt_truncated: int = 0
    """Pairs whose prompt was cut."""
    chosen_truncated: int = 0
    """Pairs whose chosen answer was cut."""
    rejected_truncated: int = 0
    """Pairs whose rejected answer was cut."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers, from 0, by reason."""
    repaired: list[int] = field(default_factory=list)
    """Row numbers of pairs whose answers held the whole conversation beside a raw prompt."""
    restated: list[int] = field(default_factory=list)
    """Row numbers of pairs whose answers both begin with the text of the prompt."""
    sft_only: int = 0
    """Rows without a rejected answer, trained with the NLL alone."""
    weighted: int = 0
    """Rows with a weight other than 1."""
    with_margin: int = 0
    """Rows with a margin other than 0."""
    strings_joined: int = 0
    """Rows of strings without a template in them, joined as they are."""
    strings_templated: int = 0
    """Rows of strings that the chat template was applied to."""

    def add(self, index: int, dropped: str, flags: Mapping[str, bool]) -> None:
        """Counts one row: the reason why it was dropped (empty where it was kept), and the flags of `BuiltPair`."""
        self.rows += 1
        if dropped:
            self.dropped.setdefault(dropped, []).append(index)
            return
        self.kept += 1
        self.prompt_truncated += flags["prompt_truncated"]
        self.chosen_truncated += flags["chosen_truncated"]
        self.rejected_truncated += flags["rejected_truncated"]
        self.sft_only += flags["sft_only"]
        self.weighted += flags["weighted"]
        self.with_margin += flags["with_margin"]
        self.strings_joined += flags["strings_joined"]
        self.strings_templated += flags["strings_templated"]
        for name in ("repaired", "restated"):
            if flags[name]:
                getattr(self, name).append(index)

    def clear(self) -> None:
        """Starts again from no rows."""
        self.__init__(name=self.name)  # type: ignore[misc]  # the fields' defaults are written once, above

    def all_whole(self) -> bool:
        """Whether every row was kept as it is, and counts as every other."""
        truncated = self.prompt_truncated + self.chosen_truncated + self.rejected_truncated
        return not (self.dropped or self.repaired or self.restated or truncated or self.weighted or self.with_margin)

    def summary(self) -> str:
        """The report in words, one line per thing to know."""
        lines = [f"{self.name}: {self.kept} of {self.rows} rows kept"]
        if self.prompt_truncated or self.chosen_truncated or self.rejected_truncated:
            lines.append(
                f"truncated: {self.prompt_truncated} prompts, {self.chosen_truncated} chosen answers, "
                f"{self.rejected_truncated} rejected answers"
            )
        if self.sft_only:
            lines.append(f"no rejected answer, trained with the NLL alone: {self.sft_only} rows")
        if self.weighted or self.with_margin:
            lines.append(
                f"columns 'weight' and 'margin': {self.weighted} rows with a weight, {self.with_margin} with a margin"
            )
        if self.repaired:
            lines.append(
                f"the answers of {len(self.repaired)} rows held the whole conversation beside a prompt column; "
                f"the column was left out there, so that no prompt is trained twice: {_numbers(self.repaired)}"
            )
        if self.restated:
            lines.append(
                f"both answers of {len(self.restated)} rows begin with the text of their prompt, which is trained "
                "twice there. If they hold the whole text, leave the prompt column out: what both share is the prompt "
                f"then: {_numbers(self.restated)}"
            )
        lines += [f"dropped {len(rows)}: {reason}: {_numbers(rows)}" for reason, rows in self.dropped.items()]
        return "\n  ".join(lines)


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:10]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}{f' and {len(rows) - 10} more' if len(rows) > 10 else ''}"
