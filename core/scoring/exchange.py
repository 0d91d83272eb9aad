"""What forward passes gave, and how ranks tell each other."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from core.engine.ranks import Ranks


class Pass(NamedTuple):
    """What a forward pass gave."""

    number: int  # from 1; 0 where it does not count
    positions: np.ndarray  # (count,) int64: targets
    nats: np.ndarray  # (count,) float64
    moments: np.ndarray | None = None  # (2,) float64: what a temperature learns from


def gathered(ranks: Ranks, held: Sequence[Pass]) -> list[Pass]:
    """Return what the passes of all ranks gave, in their order; nothing where one is alone, who writes at once."""
    if ranks.world == 1:
        return []
    moments = [np.full(2, np.nan) if one.moments is None else one.moments for one in held]
    sides = [
        np.array([(one.number, len(one.positions)) for one in held], np.int64).reshape(-1),
        np.concatenate([np.empty(0, np.int64), *(one.positions for one in held)]),
        np.concatenate([np.empty(0), *(one.nats for one in held)]),
        np.concatenate([np.empty(0), *moments]),
    ]
    passes = []
    for of_rank in zip(*map(ranks.gather, sides), strict=True):
        heads, positions, nats, sums = of_rank[0].reshape(-1, 2), *of_rank[1:3], of_rank[3].reshape(-1, 2)
        cuts = np.cumsum(heads[:, 1])[:-1]
        parts = zip(heads[:, 0].tolist(), np.split(positions, cuts), np.split(nats, cuts), sums, strict=False)
        passes += [Pass(n, p, c, None if np.isnan(m).any() else m) for n, p, c, m in parts]
    return sorted(passes, key=lambda one: one.number)
