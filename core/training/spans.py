"""How many documents the batches of a text hold, so that an engine makes room for them once and compiles once."""

import math

import numpy as np

from core.config import RunConfig
from core.data.dataset import Split
from core.engine.fitting import halves

SAMPLE = 1 << 22
"""Tokens of a text that are looked at, at most: windows evenly spread over it."""
RARE = 1e-6
"""Largest share of batches that may hold more documents than there is room for: a run of some thousand steps on some
ranks has none, and one would be compiled for while the clock runs."""
ROUND = 64
RATES = np.geomspace(1e-4, 30.0, 120)


def rooms(split: Split, config: RunConfig, world: int) -> tuple[tuple[int, int, int], ...]:
    """Return (rows, tokens a row, room) for every shape of micro-batches on `world` ranks (core/engine/fitting.py).

    Nothing where no form of attention asks where documents begin.
    """
    model, shapes = config.model, []
    asked = model.documents == "isolated" and model.mixes("attention")
    for seq in sorted(set(config.train.lengths)) if asked else ():
        most = config.train.rows_of(seq)[1]
        counts = documents(split, seq, model.bos)
        steps = [-(-rows // world) for rows, length in config.train.shapes if length == seq]
        sizes = {min(n, of_rank) for n in halves(most) for of_rank in steps}
        shapes += [(rows, seq, room(counts, rows)) for rows in sorted(sizes)]
    return tuple(shapes)


def documents(split: Split, seq: int, bos: int) -> np.ndarray:
    """Return how many documents each of some windows of `seq` tokens holds: one, and one more with every later BOS."""
    windows = (len(split) - 1) // seq
    taken = min(windows, max(1, SAMPLE // seq))
    starts = np.arange(taken, dtype=np.int64) * windows // max(taken, 1) * seq
    return 1 + np.count_nonzero(split.gather(starts, seq)[:, 1:] == bos, axis=1)


def room(counts: np.ndarray, rows: int) -> int:
    """Return how many documents `rows` windows drawn from `counts` have at most, but with a chance of RARE, rounded up.

    Chernoff's bound: P(sum >= s) <= (E e^(t x))^rows e^(-t s) for every t > 0; the best of RATES is taken.
    """
    top = counts.max()  # what any e^(t x) is measured by: nothing overflows
    means = np.log(np.mean(np.exp(RATES[:, None] * (counts - top)), axis=1)) + RATES * top
    bound = float(np.min((rows * means - math.log(RARE)) / RATES))
    return -(-(math.ceil(bound) - 1) // ROUND) * ROUND
