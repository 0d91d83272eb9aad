"""Batches of a split, as a pure function of how many tokens were read before, and made ahead of their use."""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from core import rng
from core.data.batch import Batch
from core.data.column import DataError
from core.data.dataset import Split


def batch(split: Split, step: int, rows: int, seq: int, seed: int, part: slice | None = None) -> Batch:
    """Return the rows of step `step`, or `part` of them, where every step has as many: a pure function."""
    return batch_from(split, step * rows, rows, seq, seed, part)


def batch_from(split: Split, first: int, rows: int, seq: int, seed: int, part: slice | None = None) -> Batch:
    """Return `rows` rows from window number `first` on, or `part` of them: a pure function of its arguments.

    Windows of seq + 1 tokens lie on a grid of stride seq; row r is window number first + r. Each epoch visits every
    window once, in the order (m * i + o) mod n with m coprime to n, drawn from (seed, epoch).
    DataError if the split is shorter than one window.
    """
    windows = (len(split) - 1) // seq
    if windows < 1:
        raise DataError(
            f"{split.name}: {len(split)} tokens, shorter than one row of seq + 1 = {seq + 1}; use a smaller train.seq"
        )
    orders: dict[int, tuple[int, int]] = {}
    wanted = range(rows)[part or slice(None)]
    starts = np.empty(len(wanted), np.int64)
    for place, row in enumerate(wanted):
        epoch, i = divmod(first + row, windows)
        if epoch not in orders:
            orders[epoch] = _order(seed, epoch, windows)
        multiplier, offset = orders[epoch]
        starts[place] = (multiplier * i + offset) % windows * seq
    tokens = split.gather(starts, seq + 1)
    return Batch(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), rows, wanted.start)


def _order(seed: int, epoch: int, windows: int) -> tuple[int, int]:
    draws = 0
    while True:
        multiplier = rng.below(seed, f"data/{epoch}/multiplier/{draws}", windows)
        if math.gcd(multiplier, windows) == 1:
            return multiplier, rng.below(seed, f"data/{epoch}/offset", windows)
        draws += 1


class Prefetch:
    """Make the batches of consecutive steps on one thread, `depth` ahead, for the rows that are in use."""

    def __init__(
        self, make: Callable[[int, int, int], Batch], tokens: int, rows: int, seq: int, depth: int = 2
    ) -> None:
        self._make, self._next, self._depth = make, tokens, depth
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ahead: deque[tuple[tuple[int, int, int], Future[Batch]]] = deque()
        self._fill(tokens, rows, seq)

    def get(self, tokens: int, rows: int, seq: int) -> Batch:
        """Return the batch of `rows` rows of `seq` behind `tokens` tokens, which must be where the last one ended.

        It raises what making the batch raised.
        """
        if tokens != self._next:
            raise ValueError(f"token {tokens} was asked of a prefetcher whose next token is {self._next}")
        if self._ahead[0][0] != (tokens, rows, seq):  # the schedule has changed the rows
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
            self._fill(tokens, rows, seq)
        batch = self._ahead[0][1].result()
        self._ahead.popleft()
        self._next = tokens + rows * seq
        self._fill(self._next, rows, seq)
        return batch

    def _fill(self, tokens: int, rows: int, seq: int) -> None:
        """Start what is missing of the next batches, if they are like this one."""
        for i in range(len(self._ahead), self._depth):
            wanted = (tokens + i * rows * seq, rows, seq)
            self._ahead.append((wanted, self._pool.submit(self._make, *wanted)))

    def close(self) -> None:
        """Drop what was made ahead and end the thread."""
        self._pool.shutdown(cancel_futures=True)
