"""Did a variant help, by how much, how sure: paired differences of an ablation's runs, by Student's t test."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from core.statistics import StatisticsError, finite

LEVEL = 0.05
"""Two-sided: intervals are of 95 %."""
EffectVerdict = Literal[
    "better", "perhaps better", "inside noise", "perhaps worse", "worse", "one seed: no interval",
    "equal differences: no interval", "nothing to compare",
]  # fmt: skip


class Paired(NamedTuple):
    """Differences of pairs (ours - reference; below 0: ours is lower), in the unit of the values."""

    n: int
    mean: float
    spread: float | None
    """Standard deviation of the differences; None for one pair."""
    low: float | None
    """Ends of the 95 % interval of the mean; None for one pair or for differences that do not vary."""
    high: float | None
    p: float | None
    """Two-sided; None for one pair, 1 for differences that do not vary (as core.statistics has it)."""


class VariantEffect(NamedTuple):
    """One variant against the reference on one backend, in bits per byte: below 0 is better."""

    variant: str
    backend: str
    basis: str
    """What the figures are: `artifact`, `validation estimates`, `training curves`."""
    at: str
    """Where they were taken: `the end`, `step 200`, `31.2 s`."""
    seeds: tuple[int, ...]
    ours: tuple[float, ...]
    reference: tuple[float, ...]
    planned: int
    """Seeds that the plan names."""
    paired: Paired | None
    """None where no seed has both."""
    holm: float | None
    """p, adjusted for all variants of the table."""
    verdict: EffectVerdict
    note: str = ""
    waiting: int = 0
    """Planned seeds that are still to come, on one side or both."""
    failed: int = 0
    """Planned seeds that nothing is to come of, since a run failed."""

    @property
    def differences(self) -> tuple[float, ...]:
        """Return ours - reference, seed by seed."""
        return tuple(a - b for a, b in zip(self.ours, self.reference, strict=True))

    @property
    def early(self) -> bool:
        """Return whether seeds are still to come, so that the verdict is an early look."""
        return self.paired is not None and self.waiting > 0

    @property
    def short(self) -> str:
        """Return how many of the planned seeds are there and why not all; empty if they are."""
        if self.paired is None or self.paired.n == self.planned:
            return ""
        out = self.planned - self.paired.n - self.waiting - self.failed
        why = [f"{self.failed} failed"] if self.failed else []
        why += [f"{out} left out"] if out > 0 else []
        return "; ".join([f"{'early look: ' if self.early else ''}{self.paired.n} of {self.planned}", *why])


def paired(ours: Sequence[float], reference: Sequence[float]) -> Paired:
    """Return the mean difference of pairs with its interval: mean +- t(0.975, n - 1) * spread / sqrt(n).

    Differences that are equal but for rounding (4 ulp of the values) say nothing about chance: no interval, p = 1.
    StatisticsError for sides of different lengths, for no pair, or for a value that is not finite.
    """
    if len(ours) != len(reference) or not ours:
        raise StatisticsError(f"{len(ours)} values against {len(reference)}: expected as many, at least one pair")
    left, right = np.array(finite("ours", ours)), np.array(finite("reference", reference))
    gaps = left - right
    n, mean = len(gaps), float(gaps.mean())
    if n == 1:
        return Paired(1, mean, None, None, None, None)
    rounding = 4 * np.finfo(np.float64).eps * max(np.abs(left).max(), np.abs(right).max())
    if np.ptp(gaps) <= rounding:
        return Paired(n, mean, 0.0, None, None, 1.0)
    from scipy.special import stdtr, stdtrit  # here: half a second to import, and few commands need it

    spread = float(gaps.std(ddof=1))
    error = spread / math.sqrt(n)
    reach = float(stdtrit(n - 1, 1 - LEVEL / 2)) * error
    return Paired(n, mean, spread, mean - reach, mean + reach, 2 * float(stdtr(n - 1, -abs(mean) / error)))


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """Return p adjusted by Holm's step-down rule for the whole family; None stays None but counts as a member.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    known = sorted((p, i) for i, p in enumerate(chances) if p is not None)
    adjusted: list[float | None] = [None] * len(chances)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(chances) - rank) * p))
        adjusted[i] = highest
    return adjusted


def judge(test: Paired | None, adjusted: float | None) -> EffectVerdict:
    """Return the verdict: `perhaps` where a difference stands alone but not among all that were looked at."""
    if test is None:
        return "nothing to compare"
    if test.p is None:
        return "one seed: no interval"
    if test.low is None:
        return "equal differences: no interval"
    if test.p >= LEVEL:
        return "inside noise"
    if adjusted is not None and adjusted < LEVEL:
        return "better" if test.mean < 0 else "worse"
    return "perhaps better" if test.mean < 0 else "perhaps worse"


def resolvable(n: int, spread: float, power: float = 0.8) -> float:
    """Return the smallest true mean difference that n pairs find (p < 0.05, on its own side) with chance `power`.

    `spread` is the standard deviation of the paired differences. Found by halving: the test statistic follows the
    noncentral t distribution with n - 1 degrees and centre effect * sqrt(n) / spread. No correction for several
    variants. StatisticsError for fewer than 2 pairs, a spread below 0, or a power outside 0.025 to 1.
    """
    if n < 2:
        raise StatisticsError(f"n={n}: expected at least 2: one pair has no interval; plan more seeds")
    if not (math.isfinite(spread) and spread >= 0):
        raise StatisticsError(f"spread={spread}: expected a finite number of at least 0")
    if not LEVEL / 2 < power < 1:
        raise StatisticsError(f"power={power}: expected a chance between {LEVEL / 2} and 1")
    from scipy.special import nctdtr, stdtrit

    limit = float(stdtrit(n - 1, 1 - LEVEL / 2))
    low, high = 0.0, 1.0
    while 1 - nctdtr(n - 1, high, limit) < power:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - nctdtr(n - 1, middle, limit) < power else (low, middle)
    return high * spread / math.sqrt(n)


def seeds_needed(effect: float, spread: float, power: float = 0.8) -> int:
    """Return how many seeds resolve a true difference of that size (its sign does not matter); see `resolvable`."""
    if not (math.isfinite(effect) and effect != 0):
        raise StatisticsError(f"effect={effect}: expected a finite number other than 0")
    from scipy.special import ndtri

    resolvable(2, spread, power)  # refuses what is wrong with the other two
    least = (float(ndtri(1 - LEVEL / 2) + ndtri(power)) * spread / abs(effect)) ** 2  # were the spread known exactly
    n = max(2, math.ceil(least))
    while n < 1_000_000 and resolvable(n, spread, power) > abs(effect):
        n += 1
    return n


def pooled_spread(tests: Sequence[Paired | None]) -> float | None:
    """Return the pooled standard deviation of paired differences, sqrt(sum (n-1) s^2 / sum (n-1)); None without any.

    Differences that do not vary are left out: they are ties of deterministic runs, not small noise.
    """
    parts = [(one.n - 1, one.spread) for one in tests if one is not None and one.spread]
    if not parts:
        return None
    return math.sqrt(sum(degrees * s * s for degrees, s in parts) / sum(degrees for degrees, _ in parts))


def effect(
    variant: str, backend: str, pairs: Sequence[tuple[int, float, float]], planned: int,
    basis: str = "artifact", at: str = "the end", note: str = "",
) -> VariantEffect:  # fmt: skip
    """Return what pairs of (seed, ours, reference) say; the verdict waits for `family`."""
    seeds, ours, reference = zip(*pairs, strict=True) if pairs else ((), (), ())
    test = paired(ours, reference) if pairs else None
    return VariantEffect(
        variant, backend, basis, at, seeds, ours, reference, planned, test, None, judge(test, None), note
    )


def family(effects: Sequence[VariantEffect]) -> tuple[VariantEffect, ...]:
    """Return the effects of one table with Holm's p and verdicts: every planned variant counts, finished or not."""
    adjusted = holm([one.paired.p if one.paired else None for one in effects])
    return tuple(one._replace(holm=p, verdict=judge(one.paired, p)) for one, p in zip(effects, adjusted, strict=True))
