"""Which pairs go into a batch together: by tokens as well as by number, and pairs of a length together.

    sampler = PairBatches(lengths, pairs_per_batch=8, max_tokens=8192, group_by_length=True, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for rows in sampler: ...

Every order is a function of (seed, epoch) alone, so a run that resumes by skipping the batches it has seen goes on
exactly where it stopped.

Two ways to respect `max_tokens`:

* `accumulation=None`: a batch takes as many pairs as fit, at most `pairs_per_batch`; the pairs of an optimizer step
  vary.
* `accumulation=A`: every A batches hold exactly A * pairs_per_batch pairs, distributed so that their token counts are
  as even as possible; the step's pairs are those of plain batches, only the cut between micro-batches moves.  With
  `nll_normalization="batch"` the gradient is the same wherever the cut lies.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from orpo_plugins.errors import ConfigError
from orpo_plugins.interfaces import Pair
from orpo_plugins.packing import common_prefix

WINDOW = 50
"""Batches whose pairs are sorted among each other: large enough to find equals, small enough to stay random."""


def pair_tokens(pair: Pair, layout: str) -> int:
    """Tokens that a pair adds to a batch: distinct ones for "shared", both sequences for any other layout.

    What *padded* adds beyond depends on the other pairs; `PairBatches(padded=True)` takes the longest sequence.
    """
    chosen, rejected = pair.chosen.input_ids, pair.rejected.input_ids
    shared = common_prefix(chosen, rejected) if layout == "shared" else 0
    return len(chosen) + len(rejected) - shared


class PairBatches(Sampler[list[int]]):
    """A batch sampler over pairs.

    Args:
        lengths: tokens of each pair (`pair_tokens`), or with `padded` the length of its longer sequence.
        pairs_per_batch: at most so many pairs in a batch, or with `accumulation` on average.
        max_tokens: at most so many tokens in a batch.
        accumulation: micro-batches per optimizer step; see the module's docstring.
        group_by_length: whether pairs of similar length go together.
        padded: whether a batch of n pairs costs 2 * n * (its longest), as *padded* does, instead of the sum.
        shuffle: a new order each epoch; False keeps the dataset's.
        seed: of all orders.

    Raises:
        ConfigError: a single pair is longer than `max_tokens`, or sizes are not positive.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        pairs_per_batch: int,
        max_tokens: int | None = None,
        accumulation: int | None = None,
        group_by_length: bool = False,
        padded: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.lengths = list(lengths)
        self.batch_size = pairs_per_batch  # Accelerate reads it
        self.max_tokens = math.inf if max_tokens is None else max_tokens
        self.accumulation = accumulation
        self.group_by_length = group_by_length
        self.padded = padded
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        for name, value in (("pairs_per_batch", pairs_per_batch), ("accumulation", accumulation or 1)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        self._check_longest()

    def set_epoch(self, epoch: int) -> None:
        """The order of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def __len__(self) -> int:
        return len(self.batches())

    def cost(self, rows: Sequence[int]) -> int:
        """Tokens of a batch of these rows."""
        lengths = [self.lengths[row] for row in rows]
        return 2 * len(lengths) * max(lengths, default=0) if self.padded else sum(lengths)

    def batches(self) -> list[list[int]]:
        """All batches of the current epoch, each row in exactly one."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.lengths)
        order = torch.randperm(count, generator=generator).tolist() if self.shuffle else list(range(count))
        if self.group_by_length:
            order = self._sorted_in_windows(order)
        if self.accumulation is None:
            batches = self._greedy(order)
            return self._shuffled(batches, generator) if self.group_by_length and self.shuffle else batches
        step = self.accumulation * self.batch_size
        steps = [order[start : start + step] for start in range(0, count, step)]
        if self.group_by_length and self.shuffle:
            whole = [rows for rows in steps if len(rows) == step]
            steps = [*self._shuffled(whole, generator), *(rows for rows in steps if len(rows) < step)]
        return [batch for rows in steps for batch in self._even(rows)]

    def _check_longest(self) -> None:
        for row, _ in enumerate(self.lengths):
            if self.cost([row]) > self.max_tokens:
                raise ConfigError(
                    f"row {row} takes {self.cost([row])} tokens by itself, more than max_tokens={self.max_tokens}: "
                    "lower max_length or raise max_tokens"
                )

    def _sorted_in_windows(self, order: list[int]) -> list[int]:
        window = WINDOW * self.batch_size
        windows = (order[start : start + window] for start in range(0, len(order), window))
        return [row for rows in windows for row in sorted(rows, key=lambda row: -self.lengths[row])]

    def _greedy(self, order: list[int]) -> list[list[int]]:
        """Cuts before the pair that would not fit."""
        batches: list[list[int]] = []
        for row in order:
            last = batches[-1] if batches else None
            if last is None or len(last) == self.batch_size or self.cost([*last, row]) > self.max_tokens:
                batches.append([row])
            else:
                last.append(row)
        return batches

    def _even(self, rows: list[int]) -> list[list[int]]:
        """One optimizer step in `accumulation` batches: longest pair first, each into the lightest batch so far."""
        parts = min(self.accumulation or 1, len(rows))
        batches: list[list[int]] = [[] for _ in range(parts)]
        for row in sorted(rows, key=lambda row: -self.lengths[row]):
            min(batches, key=lambda batch: (self.cost([*batch, row]), len(batch))).append(row)
        heaviest = max(batches, key=self.cost)
        if self.cost(heaviest) > self.max_tokens:
            raise ConfigError(
                f"{len(rows)} pairs of one step take {sum(self.cost([row]) for row in rows)} tokens, which "
                f"{parts} batches of at most max_tokens={self.max_tokens} cannot hold (the heaviest would have "
                f"{self.cost(heaviest)}): raise gradient_accumulation_steps or max_tokens"
            )
        return batches

    @staticmethod
    def _shuffled(batches: list[list[int]], generator: torch.Generator) -> list[list[int]]:
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
