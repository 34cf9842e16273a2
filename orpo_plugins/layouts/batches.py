"""A batch sampler that limits the tokens of a batch, and can put pairs of similar length together.

    batches = PairBatches(lengths, pairs_per_batch=8, max_tokens_per_batch=8192, group_by_length=True, seed=0)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for rows in batches: ...                  # the dataset rows of one batch

How the batches of an epoch are made:

1. Shuffle all rows.  With `group_by_length`, sort the rows by length inside windows of the shuffled order.
2. Split them into batches.  `step_strategy` decides how:
   "pairs"   a) Cut the order into optimizer steps of `pairs_per_batch * gradient_accumulation_steps * ranks` pairs.
             b) Split each step into `gradient_accumulation_steps * ranks` batches.  With `max_tokens_per_batch`, all of
                them get about the same number of tokens.
   "tokens"  Fill one batch after the other up to `max_tokens_per_batch`.  The number of pairs in a step varies.
3. With `group_by_length`, shuffle the steps ("pairs") or the batches ("tokens"), so lengths do not follow an order.
4. Batch number i goes to rank i % ranks.  A round is one batch for each rank:

       round    0       1       2
       rank 0   batch 0 batch 2 batch 4
       rank 1   batch 1 batch 3 batch 5

By "pairs" a step has the same pairs as without a token limit; only their split into batches differs.  With
`nll_normalization="batch"` the gradient does not depend on that split.

The order is a function of (seed, epoch) alone.  So a resumed run that skips the batches it has seen goes on exactly
where it stopped, and each rank knows its own batches without communication.  Without grouping, the order of the pairs
is that of a Trainer under Accelerate with the same seed.
"""

import heapq
import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from orpo_plugins.errors import ConfigError
from orpo_plugins.options import check_batch_options

WINDOW = 50
"""Batches per window of `group_by_length`: enough to find pairs of the same length, few enough to stay random."""

OPEN = 8
"""Batches that are filled at the same time by `step_strategy="tokens"`."""


class PairBatches(Sampler[list[int]]):
    """A batch sampler over pairs.

    Args:
        lengths: tokens of each pair (`data.lengths.token_costs`); with `padded`, the length of its longer sequence.
            A tuple if several tables are padded: one for the encoder and one for the decoder.
        pairs_per_batch: pairs in a batch; with `max_tokens_per_batch`, their average number; unused by "tokens".
        max_tokens_per_batch: the most tokens in a batch; None: no limit.
        step_strategy: "pairs" or "tokens"; see the module's docstring.
        gradient_accumulation_steps: batches of a rank per optimizer step.
        group_by_length: whether a batch gets pairs of similar length.  They come from windows of `WINDOW` batches, or
            of one optimizer step if that is more.  A window holds at most a quarter of the pairs.
        padded: whether a batch of n pairs costs 2 * n * (its longest sequence) and not the sum (`Layout.pads`).
        shuffle: a new order each epoch; False keeps the order of the dataset.
        drop_last: leaves out the last pairs if they do not fill a batch on every rank.  "tokens" leaves out none.
        seed: seed of all orders.
        ranks, rank: the number of processes that share the batches, and the number of this one.

    Each rank gets `len(self)` batches in every epoch; by "tokens", in every epoch that `plan` has counted.
    An epoch has every pair once.  Only if the last pairs are fewer than the ranks, some pairs occur a second time.

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
        """Itself.  Accelerate calls `set_epoch` here while it skips the batches of a resumed run."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def plan(self, epochs: int) -> None:
        """Checks the first `epochs` epochs before training.

        By "pairs", checks that the pairs of every step fit into its batches.  By "tokens", counts the batches of every
        epoch; then all epochs get as many batches as the one that needs most.

        Raises:
            ConfigError: the pairs of some step do not fit into its batches.
        """
        if self.by_tokens:
            most = max(len(self._batches_by_tokens(epoch)) for epoch in range(epochs))
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
        """Tokens of a batch of these rows, padding included."""
        if not self.padded:
            return sum(self.lengths[row] for row in rows)
        widest: int = sum(map(max, zip(*(self.widths[row] for row in rows), strict=True)))
        return 2 * len(rows) * widest

    # ---- the batches of all ranks

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        if self.by_tokens:
            batches = self._batches_by_tokens(epoch)
            rounds = max(len(self), math.ceil(len(batches) / self.ranks))  # more than len(self) in an unplanned epoch
            batches = self._split_until(batches, rounds * self.ranks)
            yield from batches if self.shuffle else sorted(batches)  # sorted: the order of the dataset
            return
        for rows in self._steps(epoch):
            rounds = self._rounds_of(len(rows))
            if rounds:
                yield from self._split_step(rows, rounds * self.ranks)

    @property
    def _pairs_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.ranks

    def _rounds_of(self, pairs: int) -> int:
        """The rounds that are needed for this many pairs of one step."""
        full, rest = divmod(pairs, self.batch_size * self.ranks)
        return full + (rest > 0 and not self.drop_last)

    def _order(self, epoch: int, window: int) -> tuple[list[int], torch.Generator]:
        """All rows in the order of the epoch, and the random generator for later shuffles."""
        # The same seed as in Accelerate's SeedableRandomSampler, so the permutation is the same.
        generator = torch.Generator().manual_seed(self.seed + epoch)
        count = len(self.lengths)
        order = torch.randperm(count, generator=generator).tolist() if self.shuffle else list(range(count))
        if self.group_by_length:
            windows = (order[start : start + window] for start in range(0, count, window))
            order = [row for rows in windows for row in self._longest_first(rows)]
        return order, generator

    def _window(self, batches: int, pairs_per_batch: int) -> int:
        """Pairs per window: a multiple of the pairs of `batches` batches."""
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

    def _split_step(self, rows: list[int], count: int) -> list[list[int]]:
        """The pairs of one step in `count` batches.  The largest come first, so batches of one round are alike."""
        if self.max_tokens is None:
            ordered = self._longest_first(rows) if self.group_by_length else rows
            size = self.batch_size
            return self._split_until([ordered[start : start + size] for start in range(0, len(rows), size)], count)
        batches = self._balance_padded(rows, count) if self.padded else self._balance(rows, count)
        batches.sort(key=self.cost, reverse=True)
        if self.cost(batches[0]) > self.max_tokens:
            raise ConfigError(
                f"the {len(rows)} pairs of one step take {sum(self.cost([row]) for row in rows)} tokens. They do not "
                f"fit into {count} batches of at most max_tokens_per_batch={self.max_tokens}: the largest batch would "
                f"have {self.cost(batches[0])} tokens. Raise gradient_accumulation_steps and lower the batch size by "
                "the same factor, raise max_tokens_per_batch, or set step_strategy='tokens'"
            )
        return batches

    def _balance(self, rows: list[int], count: int) -> list[list[int]]:
        """Batches with about the same number of tokens: longest pair first, each into the smallest batch so far."""
        batches: list[list[int]] = [[] for _ in range(count)]
        smallest = [(0, index) for index in range(count)]  # a heap of (tokens, batch)
        for row in self._longest_first(rows):
            tokens, index = smallest[0]
            batches[index].append(row)
            heapq.heapreplace(smallest, (tokens + self.lengths[row], index))
        return batches

    def _balance_padded(self, rows: list[int], count: int) -> list[list[int]]:
        """Batches of neighbours in the order of lengths, with the smallest token limit that `count` batches can keep.

        Bisection finds that limit.
        """
        ordered = self._longest_first(rows)
        low, high = max(self.cost([row]) for row in rows), self.cost(rows)
        while low < high:
            middle = (low + high) // 2
            if len(self._next_fit(ordered, middle)) <= count:
                high = middle
            else:
                low = middle + 1
        return self._split_until(self._next_fit(ordered, low), count)

    def _any_step_fits(self) -> bool:
        """Whether even a step of the longest pairs fits.  `_balance` exceeds the mean by less than one pair."""
        longest = heapq.nlargest(self.batch_size * self.ranks, self.lengths)
        return not self.padded and sum(longest) / self.ranks + longest[0] <= (self.max_tokens or 0)

    # ---- by tokens

    def _batches_by_tokens(self, epoch: int) -> list[list[int]]:
        limit = self.max_tokens or 0
        average = sum(map(self._cost_alone, range(len(self.lengths)))) / len(self.lengths)
        order, generator = self._order(epoch, self._window(1, max(1, int(limit / average))))
        batches = self._best_fit(order, limit) if self.shuffle and not self.padded else self._next_fit(order, limit)
        return _shuffled(batches, generator) if self.group_by_length and self.shuffle else batches

    def _best_fit(self, order: list[int], limit: int) -> list[list[int]]:
        """Bin packing: each pair goes into the fullest of `OPEN` batches that can still take it.

        This makes about a tenth fewer batches than `_next_fit`.
        """
        batches: list[list[int]] = []
        unfinished: list[tuple[int, int]] = []  # (tokens, batch)
        for row in order:
            fitting = [batch for batch in unfinished if batch[0] + self.lengths[row] <= limit]
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

    def _next_fit(self, order: list[int], limit: int) -> list[list[int]]:
        """Bin packing that keeps the order: the first pair that does not fit begins the next batch."""
        batches: list[list[int]] = []
        widths: tuple[int, ...] = ()
        tokens = 0
        for row in order:
            if batches and self.padded:
                widths = tuple(map(max, widths, self.widths[row]))
                tokens = 2 * (len(batches[-1]) + 1) * sum(widths)
            else:
                tokens += self.lengths[row]
            if not batches or tokens > limit:
                batches.append([row])
                widths, tokens = self.widths[row], self._cost_alone(row)
            else:
                batches[-1].append(row)
        return batches

    def _split_until(self, batches: list[list[int]], count: int) -> list[list[int]]:
        """Halves the largest batch until there are `count`.  If all have one pair by then, repeats the first ones."""
        batches = list(batches)
        largest = [(-self.cost(batch), index) for index, batch in enumerate(batches) if len(batch) > 1]
        heapq.heapify(largest)
        while largest and len(batches) < count:
            _, index = heapq.heappop(largest)
            half = len(batches[index]) // 2
            batches.append(batches[index][half:])
            batches[index] = batches[index][:half]
            for part in (index, len(batches) - 1):
                if len(batches[part]) > 1:
                    heapq.heappush(largest, (-self.cost(batches[part]), part))
        return [*batches, *(batches[index % len(batches)] for index in range(count - len(batches)))]

    def _cost_alone(self, row: int) -> int:
        return 2 * self.lengths[row] if self.padded else self.lengths[row]

    def _check_longest(self) -> None:
        if self.max_tokens is None:
            return
        for row in range(len(self.lengths)):
            if self._cost_alone(row) > self.max_tokens:
                raise ConfigError(
                    f"row {row} of the prepared dataset takes {self._cost_alone(row)} tokens by itself, more than "
                    f"max_tokens_per_batch={self.max_tokens}: lower max_length, leave the row out, or raise the limit"
                )


def _shuffled(batches: list[list[int]], generator: torch.Generator) -> list[list[int]]:
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
