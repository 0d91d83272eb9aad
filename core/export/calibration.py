"""What the matrices of a model multiply: second moments of rows of text, summed over passes and ranks."""

from collections.abc import Callable

import numpy as np

from core import rng
from core.engine.protocol import Arrays, Engine

AT_ONCE = 1 << 13
"""Tokens of one forward pass, about."""


def summed(engine: Engine, rows: np.ndarray, at_once: int, report: Callable[[int, int], None]) -> Arrays:
    """Return, by name, the float64 sum over `rows` (rows, seq) of a a^T, (in, in), of what enters each matrix.

    `at_once` rows go through the model together, and passes are added up in their order.
    """
    sums: Arrays = {}
    for begin in range(0, len(rows), at_once):
        for name, moment in engine.second_moments(rows[begin : begin + at_once]).items():
            sums[name] = sums.get(name, 0.0) + moment.astype(np.float64)
        report(min(begin + at_once, len(rows)), len(rows))
    return sums


def mean_moments(engine: Engine, rows: np.ndarray, total: int, report: Callable[[int, int], None]) -> Arrays:
    """Return, by name, the mean over the `total` rows of all ranks of a a^T, (in, in), rounded to float32 at the end.

    `rows` (rows, seq) are this rank's, one or more. Ranks are added up in their order: all return the same bits.
    """
    seq = rows.shape[1]
    means = {}
    for name, mine in summed(engine, rows, max(1, AT_ONCE // seq), report).items():
        parts = engine.ranks.gather(mine.reshape(-1))
        means[name] = (sum(parts[1:], parts[0]) / (total * seq)).reshape(mine.shape).astype(np.float32)
    return means


def uniform_rows(total: int, seq: int, vocab: int, seed: int, part: slice) -> np.ndarray:
    """Return rows `part` of `total` rows of `seq` tokens, (rows, seq) int32, each token as likely as any other."""
    drawn = rng.integers16(seed, "calibration", 2 * total * seq).astype("<u2").view("<u4")  # 16 bits favour some tokens
    return (drawn % vocab).astype(np.int32).reshape(total, seq)[part]
