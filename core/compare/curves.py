"""Two training curves over common windows: how long they are the same to rounding, and how far apart they end."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

END = 0.25
"""Share of the windows after rounding that the end is."""
FEW = 8
"""Windows that the end has at least, where there are as many; fewer have no interval."""


class CurveError(ValueError):
    """Curves that cannot be compared: the message says what was given and what is needed."""


class Curve(NamedTuple):
    """The lines of one run: means over the steps since the line before."""

    ends: Sequence[float]
    """Where each line ends, rising, above 0; in steps, tokens or shares of a schedule, alike in both runs."""
    means: Sequence[float]


class CommonWindows(NamedTuple):
    """Two curves over the same windows; arrays of one length."""

    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    second: np.ndarray


@dataclass(frozen=True)
class CurveGap:
    """The differences second - first in the unit of the curves; places are positions of the curves."""

    windows: int
    floor: float
    """Largest difference that rounding alone explains."""
    same_until: float
    """End of the last window before the first difference beyond the floor; 0: the first one is beyond."""
    same_within: float
    """Largest difference up to there."""
    largest: float
    """Largest difference anywhere."""
    end_windows: int = 0
    """Windows that `end` is the mean of: the last quarter of those after `same_until`."""
    end_from: float | None = None
    """Where they begin; None where the curves are the same to rounding throughout."""
    end: float | None = None
    """Their mean difference, windows weighted by length; None as above."""
    end_spread: float | None = None
    """Two standard errors of that mean, windows taken as independent; None for fewer than FEW windows."""


def common_windows(first: Curve, second: Curve, *, cut: bool = False) -> CommonWindows:
    """Return the means of both curves over the windows between the positions (0 is one) that both recorded.

    With `cut` over those of the curve with fewer lines: lines of the other that cross an edge are taken as even. A line
    counts by its length. CurveError for curves that are not rising and finite.
    """
    for name, (ends, means) in (("first", first), ("second", second)):
        rising = np.diff(np.asarray(ends, float), prepend=0.0) > 0
        if len(ends) != len(means) or not (rising.all() and np.isfinite(means).all() and np.isfinite(ends).all()):
            raise CurveError(f"{name} curve: expected finite means at finite, rising positions above 0")
    if not len(first.ends) or not len(second.ends):
        edges = np.zeros(1)
    elif cut:
        stop = min(first.ends[-1], second.ends[-1])
        inside = [np.asarray(c.ends, float)[np.asarray(c.ends) <= stop] for c in (first, second)]
        edges = np.concatenate([[0.0], min(inside, key=len)])
    else:
        edges = np.concatenate([[0.0], np.intersect1d(np.asarray(first.ends, float), np.asarray(second.ends, float))])
    return CommonWindows(edges[:-1], edges[1:], _means(first, edges), _means(second, edges))


def _means(curve: Curve, edges: np.ndarray) -> np.ndarray:
    """Return the curve's mean between neighbouring edges."""
    if len(edges) < 2:
        return np.zeros(0)
    ends = np.asarray(curve.ends, float)
    points = np.union1d(edges, ends[ends < edges[-1]])
    means, lengths = np.asarray(curve.means, float)[np.searchsorted(ends, points[1:])], np.diff(points)
    places = np.searchsorted(points, edges[:-1])
    alone = np.diff(np.append(places, len(lengths))) == 1  # a line that is a window keeps its bits
    sums = np.add.reduceat(means * lengths, places) / np.add.reduceat(lengths, places)
    return np.where(alone, means[places], sums)


def measure_gap(over: CommonWindows, floor: float) -> CurveGap:
    """Return how long two curves are the same to rounding, and their mean difference at the end."""
    gaps = over.second - over.first
    beyond = np.flatnonzero(np.abs(gaps) > floor)
    same = int(beyond[0]) if len(beyond) else len(gaps)
    gap = CurveGap(
        windows=len(gaps),
        floor=floor,
        same_until=float(np.append(over.starts, over.ends[-1:])[same]) if len(gaps) else 0.0,
        same_within=float(np.abs(gaps[:same]).max(initial=0.0)),
        largest=float(np.abs(gaps).max(initial=0.0)),
    )
    if same == len(gaps):
        return gap
    count = min(len(gaps) - same, max(FEW, math.ceil(END * (len(gaps) - same))))
    tail, weights = gaps[-count:], (over.ends - over.starts)[-count:]
    mean = float(np.average(tail, weights=weights))
    error = float(
        np.sqrt(np.sum((weights * (tail - mean)) ** 2)) / weights.sum() * math.sqrt(count / max(count - 1, 1))
    )
    return dataclasses.replace(
        gap,
        end_windows=count,
        end_from=float(over.starts[-count]),
        end=mean,
        end_spread=2 * error if count >= FEW else None,
    )
