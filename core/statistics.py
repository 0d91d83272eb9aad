"""Whether one group of runs is better than another by more than chance: Welch's unequal-variance t test."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class StatisticsError(ValueError):
    """Values that no test can be made of: the message says what was given and what is needed."""


class Welch(NamedTuple):
    """A one-sided test of whether `ours` is lower than `reference` by more than `margin`; one unit throughout."""

    ours: tuple[float, ...]
    reference: tuple[float, ...]
    difference: float
    """mean(reference) - mean(ours)."""
    margin: float
    t: float
    degrees: float
    """Degrees of freedom (Welch-Satterthwaite); 0 where neither side varies, so that nothing can be tested."""
    p: float
    """Chance of a t at least as large if the true difference were `margin`."""


def welch(ours: Sequence[float], reference: Sequence[float], margin: float) -> Welch:
    """Test H0: mean(reference) - mean(ours) <= margin, one-sided, variances not assumed equal.

    Values that do not vary on either side say nothing about chance: then t = 0, degrees = 0 and p = 1, whatever the
    difference. With 3 runs against 5 of half the spread, 1.5 % of true H0 are rejected at p < 0.01, a known limit of
    the approximation; with 12 against 20 it is 1 %.
    StatisticsError for fewer than two values on a side, or for one that is not finite.
    """
    ours, reference = _several("ours", ours), _several("reference", reference)
    if not math.isfinite(margin):
        raise StatisticsError(f"margin={margin}: expected a finite number, in the unit of the values")
    difference = float(np.mean(reference) - np.mean(ours))
    own, other = _mean_variance(ours), _mean_variance(reference)
    if own + other == 0.0:
        return Welch(ours, reference, difference, margin, 0.0, 0.0, 1.0)
    from scipy.special import stdtr  # here: it takes half a second to import, and few commands need it

    share = own / (own + other)
    degrees = 1.0 / (share**2 / (len(ours) - 1) + (1.0 - share) ** 2 / (len(reference) - 1))
    t = (difference - margin) / math.sqrt(own + other)
    return Welch(ours, reference, difference, margin, t, degrees, float(stdtr(degrees, -t)))


def finite(side: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return the values as floats; StatisticsError, with the name of their side, for one that is not finite."""
    floats = tuple(float(value) for value in values)
    for i, value in enumerate(floats):
        if not math.isfinite(value):
            raise StatisticsError(
                f"{side}[{i}] is {value}: expected a finite number; score that run again, or leave it out and say so"
            )
    return floats


def _mean_variance(values: tuple[float, ...]) -> float:
    """Return the estimated variance of the mean, exactly 0 for equal values (their computed mean may be a bit off)."""
    return 0.0 if min(values) == max(values) else float(np.var(values, ddof=1)) / len(values)


def _several(side: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return the finite values of a side, or refuse them if they are too few for a spread."""
    if len(values) < 2:
        raise StatisticsError(
            f"{side}: {len(values)} values, expected at least 2: one value has no spread; give more runs"
        )
    return finite(side, values)
