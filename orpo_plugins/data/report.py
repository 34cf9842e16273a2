"""The report of `prepare_dataset`: which rows were kept, truncated, repaired or dropped."""

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
"""The fields of `BuiltPair` that are counted."""
_WITH_ROW_NUMBERS = ("repaired", "restated")
"""The flags whose rows are listed by number."""


@dataclass(kw_only=True)
class PreparationReport:
    """Counts of a dataset's rows."""

    name: str = "train"
    """The name of the dataset in messages."""
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
    """Row numbers of pairs whose answers contained the complete conversation, so the prompt column was left out."""
    restated: list[int] = field(default_factory=list)
    """Row numbers of pairs whose answers both begin with the text of the prompt."""
    sft_only: int = 0
    """Rows without a rejected answer, trained with the NLL alone."""
    weighted: int = 0
    """Rows with a weight other than 1."""
    with_margin: int = 0
    """Rows with a margin other than 0."""
    strings_joined: int = 0
    """Rows of strings that contain no template and were joined as they are."""
    strings_templated: int = 0
    """Rows of strings that the chat template was applied to."""

    def add(self, index: int, dropped: str, flags: Mapping[str, bool]) -> None:
        """Counts one row.  `dropped` is the reason why it was dropped, or empty; `flags` are those of `BuiltPair`."""
        self.rows += 1
        if dropped:
            self.dropped.setdefault(dropped, []).append(index)
            return
        self.kept += 1
        for name in FLAGS:
            if name not in _WITH_ROW_NUMBERS:
                setattr(self, name, getattr(self, name) + flags[name])
            elif flags[name]:
                getattr(self, name).append(index)

    def clear(self) -> None:
        """Sets all counts back to zero."""
        self.__init__(name=self.name)  # type: ignore[misc]  # the defaults of the fields above

    def all_whole(self) -> bool:
        """Whether every row was kept unchanged, with the same weight."""
        truncated = self.prompt_truncated + self.chosen_truncated + self.rejected_truncated
        return not (self.dropped or self.repaired or self.restated or truncated or self.weighted or self.with_margin)

    def summary(self) -> str:
        """The report as text, with one line per finding."""
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
                f"the answers of {len(self.repaired)} rows contained the complete conversation, so their prompt column "
                f"was left out and no prompt is trained twice: {_numbers(self.repaired)}"
            )
        if self.restated:
            lines.append(
                f"both answers of {len(self.restated)} rows begin with the text of their prompt, so it is trained "
                "twice. If the answers contain the complete text, remove the prompt column; then their common "
                f"beginning is the prompt: {_numbers(self.restated)}"
            )
        lines += [f"dropped {len(rows)}: {reason}: {_numbers(rows)}" for reason, rows in self.dropped.items()]
        return "\n  ".join(lines)


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:10]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}{f' and {len(rows) - 10} more' if len(rows) > 10 else ''}"
