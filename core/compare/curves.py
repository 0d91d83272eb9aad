"""Where two training curves part: common windows, rounding, and a test that takes the noise from the difference.

The difference of two runs of one preset starts at rounding, grows as rounding does in training, and then wanders: noise
whose size changes and which remembers. So the test takes its scale from both sides of every place where the curves may
part, less the mean before and a line after (a self-normalised scan: Lobato 2001, Shao and Zhang 2010), and its limit
from the same differences with signs drawn at random for blocks as long as the noise remembers. Slower drift is seen as
parting: only other pairs of runs can tell it from noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

ENOUGH = 20
"""Fewest common windows that a parting is looked for in."""
TAIL = 8
"""Fewest windows after a parting: with fewer, chance alone gives all of them one sign too often."""
MOST = 256
"""Windows that the scan sees; more are merged with their neighbours."""
FLIPS = 199
LEVEL = 0.01
"""Chance of claiming a parting where blocks of the difference have signs at random."""
INTERVAL = math.sqrt(45.4 / 6)
"""95 % of |mean| / error for `_error`'s errors (45.4: Lobato 2001, table 1; 2.75 where known noise would give 1.96)."""


class TransferError(ValueError):
    """Curves that cannot be held against each other: the message says what was given and what is needed."""


class Curve(NamedTuple):
    """The lines of one run: means over the steps since the line before."""

    ends: Sequence[float]
    """Where each line ends, rising, above 0; in steps, tokens or shares of a schedule, alike in both runs."""
    means: Sequence[float]


class Windows(NamedTuple):
    """Two curves over the same windows; arrays of one length."""

    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    second: np.ndarray


@dataclass(frozen=True)
class Finding:
    """What the differences second - first show, in the unit of the curves; places are positions of the curves."""

    windows: int
    floor: float
    """Largest difference that rounding alone explains."""
    same_until: float
    """End of the last window before the first difference beyond the floor; 0: the first one is beyond."""
    same_within: float
    """Largest difference up to there."""
    after: int
    """Windows after that."""
    mean: float | None = None
    """Mean difference after that, None where nothing is left."""
    spread: float | None = None
    """Half of its 95 % interval; None for fewer than ENOUGH windows."""
    memory: int | None = None
    """Windows that the noise remembers, as far as they show it."""
    p: float | None = None
    """Chance of a scan as large by random signs; None for fewer than ENOUGH windows."""
    parts_after: float | None = None
    """Where the curves part: the start of the first window apart; None if that is not shown."""
    between: tuple[float, float] | None = None
    """That place could as well be anywhere from here to here."""
    apart: float | None = None
    """Mean difference from there on."""
    apart_spread: float | None = None
    """Half of its 95 % interval."""
    at_end: float | None = None
    """Mean difference over the last quarter of that."""
    shape: str | None = None
    """growing, steady or shrinking since."""


def windows(first: Curve, second: Curve, *, cut: bool = False) -> Windows:
    """Return the means of both curves over the windows between the positions (0 is one) that both recorded.

    With `cut` over those of the curve with fewer lines: lines of the other that cross an edge are taken as even. A line
    counts by its length. TransferError for curves that are not rising and finite.
    """
    for name, (ends, means) in (("first", first), ("second", second)):
        rising = np.diff(np.asarray(ends, float), prepend=0.0) > 0
        if len(ends) != len(means) or not (rising.all() and np.isfinite(means).all() and np.isfinite(ends).all()):
            raise TransferError(f"{name} curve: expected finite means at finite, rising positions above 0")
    if not len(first.ends) or not len(second.ends):
        edges = np.zeros(1)
    elif cut:
        stop = min(first.ends[-1], second.ends[-1])
        inside = [np.asarray(c.ends, float)[np.asarray(c.ends) <= stop] for c in (first, second)]
        edges = np.concatenate([[0.0], min(inside, key=len)])
    else:
        edges = np.concatenate([[0.0], np.intersect1d(np.asarray(first.ends, float), np.asarray(second.ends, float))])
    return Windows(edges[:-1], edges[1:], _over(first, edges), _over(second, edges))


def _over(curve: Curve, edges: np.ndarray) -> np.ndarray:
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


def find(over: Windows, floor: float) -> Finding:
    """Return how far the curves are the same, and whether and where they part after that."""
    gaps = over.second - over.first
    beyond = np.flatnonzero(np.abs(gaps) > floor)
    same = int(beyond[0]) if len(beyond) else len(gaps)
    rest = gaps[same:]
    found = Finding(
        windows=len(gaps),
        floor=floor,
        same_until=float(np.append(over.starts, over.ends[-1:])[same]) if len(gaps) else 0.0,
        same_within=float(np.abs(gaps[:same]).max(initial=0.0)),
        after=len(rest),
        mean=float(np.average(rest, weights=(over.ends - over.starts)[same:])) if len(rest) else None,
    )
    if len(rest) < ENOUGH:
        return found
    merged, edges = merge(rest, np.append(over.starts[same:], over.ends[-1]), MOST)
    memory = memory_of(merged)
    p = chance(merged, memory)
    found = replace(found, spread=INTERVAL * _error(merged), memory=memory * (len(rest) // len(merged)), p=p)
    if p > LEVEL:
        return found
    at, low, high = place(merged)
    tail = merged[at:]
    last = max(TAIL // 2, len(tail) // 4)
    if not _stays(tail[-last:], float(tail.sum()), memory):
        return found
    return replace(
        found,
        parts_after=float(edges[at]),
        between=(float(edges[low]), float(edges[high])),
        apart=float(tail.mean()),
        apart_spread=INTERVAL * _error(tail),
        at_end=float(tail[-last:].mean()),
        shape=_shape(tail),
    )


def merge(values: np.ndarray, edges: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` means of as many neighbours each, and their edges; a rest at the start is left out."""
    size = -(-len(values) // most)
    skip = len(values) % size
    return values[skip:].reshape(-1, size).mean(1), edges[skip::size]


def _error(values: np.ndarray) -> float:
    """Return a standard error of the mean of remembering noise, from how its partial sums wander (see INTERVAL)."""
    paths = np.cumsum(values - values.mean())
    return math.sqrt(6 * float(paths @ paths) / len(values) ** 3)


def _line(tails: np.ndarray) -> np.ndarray:
    """Return (..., n) values less their best line."""
    x = np.arange(tails.shape[-1]) - (tails.shape[-1] - 1) / 2
    slope = tails @ x / (x @ x)
    return tails - tails.mean(-1, keepdims=True) - slope[..., None] * x


def _scan(values: np.ndarray) -> np.ndarray:
    """Return the largest |mean| / error of any tail for each row of (rows, n) values."""
    n = values.shape[-1]
    least = max(TAIL, n // 10)
    best = np.zeros(len(values))
    for size in np.unique([*np.linspace(least, n - least, 16).astype(int), n]):
        head, tail = values[:, : n - size], values[:, n - size :]
        wander = np.sum(np.cumsum(_line(tail), 1) ** 2, 1)
        if size < n:
            wander += np.sum(np.cumsum(head - head.mean(1, keepdims=True), 1) ** 2, 1)
        noise = np.sqrt(wander * size / (size**2 / 15 + (n - size) ** 2 / 6))  # as expected of noise without memory
        best = np.maximum(best, np.abs(tail.sum(1)) / np.maximum(noise, 1e-300))
    return best


def memory_of(values: np.ndarray) -> int:
    """Return over how many windows the noise remembers: twice the sum of its autocorrelation, up to a twelfth of all.

    The noise is what the mean before the likeliest parting and a line after it leave; the sum ends where the
    correlation first falls within its own error.
    """
    n = len(values)
    at = place(values)[0]
    head, tail = values[:at], values[at:]
    parts = [part for part in (head - head.mean() if len(head) else head, _line(tail)) if len(part)]
    noise = np.concatenate([part / max(float(np.sqrt(np.mean(part**2))), 1e-300) for part in parts])
    total, most = 1.0, max(1, n // 12)
    for lag in range(1, most + 1):
        correlation = float(noise[:-lag] @ noise[lag:]) / n
        if correlation < 1.64 / math.sqrt(n):
            break
        total += 2 * correlation
    return min(most, max(1, round(total)))


def chance(values: np.ndarray, block: int) -> float:
    """Return the share of draws of signs, one for each block, whose scan is as large as the one of `values`."""
    draws = np.random.default_rng(0)
    blocks = -(-len(values) // block)
    signs = draws.choice([-1.0, 1.0], (FLIPS, blocks)).repeat(block, axis=1)[:, -len(values) :]
    scans = _scan(np.concatenate([values[None], signs * values]))
    return float(np.mean(scans >= scans[0] * (1 - 1e-9)))


def place(values: np.ndarray) -> tuple[int, int, int]:
    """Return where the mean leaves 0 for good, likeliest, and the first and last place that are not much less likely.

    By likelihood, for noise of one size around 0 before and around one mean after; not much less: by a factor of 20.
    """
    n = len(values)
    sizes = np.arange(n, TAIL - 1, -1)
    gains = np.cumsum(values[::-1])[sizes - 1] ** 2 / sizes
    best = int(np.argmax(gains))
    left = float(values @ values) - gains
    likely = (
        np.flatnonzero(n * np.log(left / max(left[best], 1e-300)) <= 2 * math.log(20)) if left[best] > 0 else [best]
    )
    return best, int(likely[0]), int(likely[-1])


def _stays(end: np.ndarray, side: float, memory: int) -> bool:
    """Return whether the end of a parted difference is still on its side, by more than two standard errors."""
    return float(np.sign(side) * end.mean()) > 2 * float(end.std(ddof=1)) * math.sqrt(memory / len(end))


def _shape(tail: np.ndarray) -> str:
    """Return how the difference goes on after it parted, judged by the noise beside a line."""
    half, paths = len(tail) // 2, np.cumsum(_line(tail))
    unit = math.sqrt(15 * float(paths @ paths)) / len(tail)  # the error of one window, memory included
    change = float(np.sign(tail.sum()) * (tail[-half:].mean() - tail[:half].mean()))
    error = INTERVAL * unit * math.sqrt(2 / half)
    return "growing" if change > error else "shrinking" if change < -error else "steady"
