"""Time, tokens and a profile of the steps of a Trainer."""

from typing import Any

import torch
from measure import CUDA, now

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "mkldnn"),
    "attention": ("flash_attention", "scaled_dot_product"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::clone", "aten::contiguous", "aten::fill_", "zero_"),
    "softmax, exp, log": ("softmax", "aten::exp", "aten::log", "logsumexp", "aten::gather"),
    "optimizer and clipping": (
        "foreach",
        "fused_adam",
        "Optimizer",
        "adamw",
        "addcdiv",
        "addcmul",
        "lerp",
        "vector_norm",
    ),
}
"""Kinds of operations, by parts of their names."""
ACTIVITY = torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU


class Clock:
    """CPU seconds from one step's end to the next; the last step runs under a profiler instead."""

    def __init__(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        self.seconds: list[float] = []
        self.shares: dict[str, float] = {}
        self.batches: list[tuple[int, int]] = []
        self._last = 0.0
        clock = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock._last = now()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                end = now()
                clock.seconds.append(end - clock._last)
                clock._last = end
                if state.global_step == state.max_steps - 1:
                    clock._profiler = torch.profiler.profile(activities=[ACTIVITY])
                    clock._profiler.start()
                elif state.global_step == state.max_steps:
                    clock._profiler.stop()
                    clock.shares = shares(clock._profiler)

        trainer.add_callback(Callback())
        self._count_batches(trainer)

    def _count_batches(self, trainer: Any) -> None:
        collate = trainer.data_collator
        clock = self

        class Counting(type(collate)):  # type: ignore[misc]
            def __call__(self, features: Any) -> Any:
                clock.batches.append(token_counts(features))
                return super().__call__(features)

        collate.__class__ = Counting

    def token_counts(self) -> dict[str, int]:
        """Tokens that a padded batch holds, and those that a shared one does, over all batches."""
        return {
            "tokens": sum(padded for padded, _ in self.batches),
            "distinct_tokens": sum(distinct for _, distinct in self.batches),
        }


def token_counts(features: list[dict[str, Any]]) -> tuple[int, int]:
    """(padded, distinct) tokens of tokenized rows."""
    sides = [row["chosen_input_ids"] for row in features] + [row["rejected_input_ids"] for row in features]
    distinct = 0
    for row in features:
        chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
        shorter = min(len(chosen), len(rejected))
        shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
        distinct += len(chosen) + len(rejected) - shared
    return len(sides) * max(map(len, sides)), distinct


def shares(profiler: Any) -> dict[str, float]:
    """Where a step's CPU time goes: share of each kind of operation, by its own time."""
    events = profiler.key_averages()
    own = "self_device_time_total" if CUDA else "self_cpu_time_total"
    total = sum(getattr(event, own) for event in events) or 1
    found = dict.fromkeys([*KINDS, "elementwise and rest"], 0.0)
    for event in events:
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "elementwise and rest")
        found[kind] += getattr(event, own) / total
    return {kind: round(share, 3) for kind, share in found.items()}
