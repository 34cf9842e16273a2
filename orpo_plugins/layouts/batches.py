"""Which pairs go into a batch together: by tokens as well as by number, and pairs of a length together.

    batches = PairBatches(lengths, pairs_per_batch=8, max_tokens_per_batch=8192, group_by_length=True, seed=0)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for rows in batches: ...

Every order is a function of (seed, epoch) alone, so a run that resumes by skipping the batches it has seen goes on
exactly where it stopped, and each of several ranks knows its own share without asking the others.

`step_strategy` says what an optimizer step (`gradient_accumulation_steps` batches on each rank) is made of:

* "pairs": of exactly `pairs_per_batch * gradient_accumulation_steps * ranks` pairs, those of plain batches in the same
  order.  Only the cuts between its batches move: `max_tokens_per_batch` makes them as even in tokens as possible, over
  all ranks.  With `nll_normalization="batch"` the gradient is the same wherever the cuts lie.
* "tokens": every batch takes as many pairs as `max_tokens_per_batch` has room for; the pairs of a step vary.

Without grouping, the order of the pairs is that of a Trainer under Accelerate with the same seed.
"""

import heapq
import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from orpo_plugins.errors import ConfigError
from orpo_plugins.options import check_batch_options

WINDOW = 50
"""Batches whose pairs are sorted among each other: large enough to find equals, small enough to stay random."""

OPEN = 8
"""Batches that may still get a pair while they are filled up to a limit."""


class PairBatches(Sampler[list[int]]):
    """A batch sampler over pairs.

    Args:
        lengths: tokens of each pair (`data.lengths.token_costs`), or with `padded` the length of its longer sequence; a
            tuple where several tables are padded (an encoder's and a decoder's).
        pairs_per_batch: pairs in a batch, with `max_tokens_per_batch` on average; unused by "tokens".
        max_tokens_per_batch: at most so many tokens in a batch.
        step_strategy: "pairs" or "tokens"; see the module's docstring.
        gradient_accumulation_steps: batches of a rank per optimizer step.
        group_by_length: whether pairs of similar length go together, within windows of `WINDOW` batches or, where that
            is more, of one optimizer step; windows are at most a quarter of the pairs.
        padded: whether a batch of n pairs costs 2 * n * (its longest) instead of the sum (`Layout.pads`).
        shuffle: a new order each epoch; False keeps the dataset's.
        drop_last: leaves out the pairs that fill no whole batch on every rank.  "tokens" leaves out none.
        seed: of all orders.
        ranks, rank: how many processes share the batches out, and which of them this is.

    Each rank gets the same number of batches in every epoch: `len(self)`, by "tokens" in those that `plan` was told of.
    All pairs are seen once per epoch, but for fewer pairs at its end than there are ranks: then some from its beginning
    are repeated.

    Raises:
        ConfigError: a single pair is longer than `max_tokens_per_batch`, or an option is unknown or out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Sequence[tuple[int, ...]],
        *,
        pairs_per_batch: int,
        max_tokens_per_batch: int | None = None,
        step_strategy: str = "pairs",
        gradient_accumulation_steps: int = 1,
        group_by_length: bool = False,
        padded: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        check_batch_options(max_tokens_per_batch, step_strategy)
        sizes = {"pairs_per_batch": pairs_per_batch, "gradient_accumulation_steps": gradient_accumulation_steps}
        for name, value in {**sizes, "ranks": ranks}.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank is {rank}: it must be one of the {ranks} ranks from 0")
        self.widths = [length if isinstance(length, tuple) else (length,) for length in lengths]
        self.lengths = [sum(widths) for widths in self.widths]
        self.batch_size = pairs_per_batch  # Accelerate reads it
        self.max_tokens = max_tokens_per_batch
        self.by_tokens = step_strategy == "tokens"
        self.accumulation = gradient_accumulation_steps
        self.group_by_length = group_by_length
        self.padded = padded
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.ranks, self.rank = ranks, rank
        self.epoch = 0
        self._rounds = 0
        self._check_longest()

    @property
    def sampler(self) -> "PairBatches":
        """Itself: where Accelerate looks for `set_epoch` while it skips the batches of a resumed run."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The order of the next iteration."""
        self.epoch = epoch

    def plan(self, epochs: int) -> None:
        """Goes through the orders of the first `epochs` epochs beforehand, as far as anything depends on them.

        By tokens, epochs differ in how many batches they need; all of them get as many as the one that needs most.

        Raises:
            ConfigError: the pairs of some step do not fit into its batches.
        """
        if self.by_tokens:
            most = max(len(self._as_fits(epoch)) for epoch in range(epochs))
            self._rounds = max(self._rounds, math.ceil(most / self.ranks))
        elif self.max_tokens is not None and not self._any_step_fits():
            for epoch in range(epochs):
                for _ in self._batches(epoch):
                    pass

    def __iter__(self) -> Iterator[list[int]]:
        return (batch for index, batch in enumerate(self._batches(self.epoch)) if index % self.ranks == self.rank)

    def __len__(self) -> int:
        if self.by_tokens:
            if not self._rounds:
                self.plan(1)
            return self._rounds
        steps, rest = divmod(len(self.lengths), self._pairs_per_step)
        return steps * self.accumulation + self._rounds_of(rest)

    def cost(self, rows: Sequence[int]) -> int:
        """Tokens of a batch of these rows."""
        if not self.padded:
            return sum(self.lengths[row] for row in rows)
        widest: int = sum(map(max, zip(*(self.widths[row] for row in rows), strict=True)))
        return 2 * len(rows) * widest

    # ---- the batches of all ranks, which take them in turns

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        if self.by_tokens:
            batches = self._as_fits(epoch)
            rounds = max(len(self), math.ceil(len(batches) / self.ranks))  # more than len where `plan` was not told
            batches = self._filled(batches, rounds * self.ranks)
            yield from batches if self.shuffle else sorted(batches)  # halves go back to their places
            return
        for rows in self._steps(epoch):
            rounds = self._rounds_of(len(rows))
            if rounds:
                yield from self._cut(rows, rounds * self.ranks)

    @property
    def _pairs_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.ranks

    def _rounds_of(self, pairs: int) -> int:
        """How many batches of a rank so many pairs of one step make."""
        whole, rest = divmod(pairs, self.batch_size * self.ranks)
        return whole + (rest > 0 and not self.drop_last)

    def _order(self, epoch: int, window: int) -> tuple[list[int], torch.Generator]:
        """All rows, and the generator for what else is random."""
        # Seeded as Accelerate's SeedableRandomSampler is, which draws the same permutation.
        generator = torch.Generator().manual_seed(self.seed + epoch)
        count = len(self.lengths)
        order = torch.randperm(count, generator=generator).tolist() if self.shuffle else list(range(count))
        if self.group_by_length:
            windows = (order[start : start + window] for start in range(0, count, window))
            order = [row for rows in windows for row in self._longest_first(rows)]
        return order, generator

    def _window(self, batches: int, pairs_per_batch: int) -> int:
        """Pairs that are sorted among each other: a multiple of those of `batches` batches."""
        unit = batches * pairs_per_batch
        return max(1, min(WINDOW * pairs_per_batch, len(self.lengths) // 4) // unit) * unit

    def _longest_first(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda row: -self.lengths[row])

    # ---- by pairs

    def _steps(self, epoch: int) -> Iterator[list[int]]:
        """The rows of each optimizer step; an incomplete step comes last."""
        step = self._pairs_per_step
        order, generator = self._order(epoch, self._window(self.accumulation * self.ranks, self.batch_size))
        steps = [order[start : start + step] for start in range(0, len(order), step)]
        last = steps.pop() if steps and len(steps[-1]) < step else []
        if self.group_by_length and self.shuffle:
            steps = _shuffled(steps, generator)
        yield from steps
        if self.drop_last:
            last = last[: len(last) // (self.batch_size * self.ranks) * self.batch_size * self.ranks]
        if last:
            missing = self._rounds_of(len(last)) * self.ranks - len(last)
            yield [*last, *(order[index % len(order)] for index in range(missing))]

    def _cut(self, rows: list[int], count: int) -> list[list[int]]:
        """One step in `count` batches, heavy ones first, so that those of a round are alike."""
        if self.max_tokens is None:
            ordered = self._longest_first(rows) if self.group_by_length else rows
            size = self.batch_size
            return self._filled([ordered[start : start + size] for start in range(0, len(rows), size)], count)
        batches = self._even_padded(rows, count) if self.padded else self._even(rows, count)
        batches.sort(key=self.cost, reverse=True)
        if self.cost(batches[0]) > self.max_tokens:
            raise ConfigError(
                f"the {len(rows)} pairs of one step take {sum(self.cost([row]) for row in rows)} tokens, which "
                f"{count} batches of at most max_tokens_per_batch={self.max_tokens} cannot hold (the fullest would "
                f"have {self.cost(batches[0])}): raise gradient_accumulation_steps and lower the batch size as much, "
                "raise max_tokens_per_batch, or set step_strategy='tokens'"
            )
        return batches

    def _even(self, rows: list[int], count: int) -> list[list[int]]:
        """Longest pair first, each into the lightest batch so far."""
        batches: list[list[int]] = [[] for _ in range(count)]
        lightest = [(0, index) for index in range(count)]
        for row in self._longest_first(rows):
            tokens, index = lightest[0]
            batches[index].append(row)
            heapq.heapreplace(lightest, (tokens + self.lengths[row], index))
        return batches

    def _even_padded(self, rows: list[int], count: int) -> list[list[int]]:
        """Neighbours in the order of lengths, cut so that the heaviest batch is as light as such cuts allow."""
        ordered = self._longest_first(rows)
        low, high = max(self.cost([row]) for row in rows), self.cost(rows)
        while low < high:
            middle = (low + high) // 2
            if len(self._greedy(ordered, middle)) <= count:
                high = middle
            else:
                low = middle + 1
        return self._filled(self._greedy(ordered, low), count)

    def _any_step_fits(self) -> bool:
        """Whether the longest pairs fit even if they meet: `_even` is over the mean by less than one pair."""
        longest = heapq.nlargest(self.batch_size * self.ranks, self.lengths)
        return not self.padded and sum(longest) / self.ranks + longest[0] <= (self.max_tokens or 0)

    # ---- by tokens

    def _as_fits(self, epoch: int) -> list[list[int]]:
        """All rows in batches as full as they get."""
        room = self.max_tokens or 0
        average = sum(map(self._alone, range(len(self.lengths)))) / len(self.lengths)
        order, generator = self._order(epoch, self._window(1, max(1, int(room / average))))
        batches = self._best_fit(order, room) if self.shuffle and not self.padded else self._greedy(order, room)
        return _shuffled(batches, generator) if self.group_by_length and self.shuffle else batches

    def _best_fit(self, order: list[int], room: int) -> list[list[int]]:
        """Each pair into the fullest of the last `OPEN` batches that has room for it: a tenth fewer than `_greedy`."""
        batches: list[list[int]] = []
        unfinished: list[tuple[int, int]] = []
        for row in order:
            fitting = [batch for batch in unfinished if batch[0] + self.lengths[row] <= room]
            if fitting:
                tokens, index = max(fitting)
                unfinished.remove((tokens, index))
                batches[index].append(row)
            else:
                tokens, index = 0, len(batches)
                batches.append([row])
            unfinished.append((tokens + self.lengths[row], index))
            if len(unfinished) > OPEN:
                unfinished.remove(max(unfinished))
        return batches

    def _greedy(self, order: list[int], room: int) -> list[list[int]]:
        """Cuts before the pair that would not fit."""
        batches: list[list[int]] = []
        widths: tuple[int, ...] = ()
        tokens = 0
        for row in order:
            if batches and self.padded:
                widths = tuple(map(max, widths, self.widths[row]))
                tokens = 2 * (len(batches[-1]) + 1) * sum(widths)
            else:
                tokens += self.lengths[row]
            if not batches or tokens > room:
                batches.append([row])
                widths, tokens = self.widths[row], self._alone(row)
            else:
                batches[-1].append(row)
        return batches

    def _filled(self, batches: list[list[int]], count: int) -> list[list[int]]:
        """`count` batches: the heaviest are halved until there are enough, and the first are repeated if need be."""
        batches = list(batches)
        heaviest = [(-self.cost(batch), index) for index, batch in enumerate(batches) if len(batch) > 1]
        heapq.heapify(heaviest)
        while heaviest and len(batches) < count:
            _, index = heapq.heappop(heaviest)
            half = len(batches[index]) // 2
            batches.append(batches[index][half:])
            batches[index] = batches[index][:half]
            for part in (index, len(batches) - 1):
                if len(batches[part]) > 1:
                    heapq.heappush(heaviest, (-self.cost(batches[part]), part))
        return [*batches, *(batches[index % len(batches)] for index in range(count - len(batches)))]

    def _alone(self, row: int) -> int:
        return 2 * self.lengths[row] if self.padded else self.lengths[row]

    def _check_longest(self) -> None:
        if self.max_tokens is None:
            return
        for row in range(len(self.lengths)):
            if self._alone(row) > self.max_tokens:
                raise ConfigError(
                    f"row {row} of those kept takes {self._alone(row)} tokens by itself, more than "
                    f"max_tokens_per_batch={self.max_tokens}: lower max_length, leave the row out, or raise the limit"
                )


def _shuffled(batches: list[list[int]], generator: torch.Generator) -> list[list[int]]:
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
