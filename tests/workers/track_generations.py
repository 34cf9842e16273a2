"""Trains, or only evaluates, with `generate_during_eval` and a tracker.

Usage: track_generations.py <tracker> <output folder> <"train" and "evaluate", in the order wanted>
"""

import contextlib
import sys
from pathlib import Path

with contextlib.suppress(ImportError):
    import comet_ml  # noqa: F401  # wants to be imported before torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.kit import tiny
from tests.kit.training import trainer


def main() -> None:
    """Evaluates after steps 2 and 4 of training, and once for "evaluate"; two prompts each."""
    tracker, folder, *commands = sys.argv[1:]
    model = tiny.model()
    model.generation_config.max_new_tokens = 5
    made = trainer(
        Path(folder),
        model=model,
        eval_dataset=tiny.rows(6),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        generate_during_eval=True,
        report_to=tracker,
        project="orpo",
    )
    for command in commands:
        getattr(made, command)()


if __name__ == "__main__":
    main()
