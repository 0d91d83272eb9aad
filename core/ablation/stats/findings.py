"""What an ablation found: every variant against the reference, at the end and at equal steps, seconds and bytes."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from core.ablation.stats.caveats import SeedPair, alike, company, missing, uneven, unlike
from core.ablation.stats.effects import VariantEffect, effect, family, pooled_spread
from core.ablation.stats.results import Result, Results

SAME_SIZE = 0.005
"""Share by which artifacts may differ and still count as equally big."""
SAME_TIME = 0.02


class VariantSummary(NamedTuple):
    """Means over the finished runs of one variant on one backend; None where no run is finished."""

    variant: str
    n: int
    bpb: float | None
    spread: float | None
    """Standard deviation over seeds; None below two."""
    bytes: float | None
    parameters: int | None
    tokens_per_second: float | None
    seconds: float | None


class Size(NamedTuple):
    """The bytes that a variant costs, and how it compares at equal size; `equal` is None if nothing has that size."""

    variant: str
    bytes: float | None
    """Mean difference to the reference."""
    per_100kb: float | None
    """Difference in bits per byte for each 100,000 bytes of it; None for equal sizes."""
    equal: VariantEffect | None
    note: str


class Findings(NamedTuple):
    """One backend's tables; `ends`, `steps`, `seconds` and `sizes` name the variants but the reference, as planned."""

    backend: str
    summaries: tuple[VariantSummary, ...]
    """In the order of the plan, with the reference."""
    ends: tuple[VariantEffect, ...]
    steps: tuple[VariantEffect, ...]
    seconds: tuple[VariantEffect, ...]
    sizes: tuple[Size, ...]
    spread: float | None
    """Pooled standard deviation of the paired differences at the end."""
    doubts: tuple[str, ...]


def assess(outcome: Results) -> list[Findings]:
    """Return what the finished runs say, a backend at a time; backends are never mixed."""
    return [_assess(outcome, backend) for backend in outcome.plan.backends]


def scored(outcome: Results, variant: str, backend: str) -> list[Result]:
    """Return the finished runs of a variant that have a finite score, by seed."""
    return [r for r in outcome.of(variant, backend) if r.bpb is not None and math.isfinite(r.bpb)]


def _assess(outcome: Results, backend: str) -> Findings:
    plan = outcome.plan
    groups = {name: scored(outcome, name, backend) for name in plan.variants}
    reference = {r.seed: r for r in groups[plan.reference]}
    both = {
        name: [(r, reference[r.seed]) for r in runs if r.seed in reference]
        for name, runs in groups.items()
        if name != plan.reference
    }
    planned, kind = len(plan.seeds), plan.budget[0]
    doubts = missing(outcome, backend) + unlike(both)
    pairs = {name: [p for p in of if alike(p)] for name, of in both.items()}
    doubts += uneven(outcome, pairs, [r for runs in groups.values() for r in runs])
    doubts += [doubt for name, of in pairs.items() for doubt in company(name, of, kind)]
    ends = family([effect(name, backend, _bpb(of), planned) for name, of in pairs.items()])
    lost = {name: _lost(outcome, name, backend) for name in pairs}

    def counted(effects: Iterable[VariantEffect]) -> tuple[VariantEffect, ...]:
        return tuple(e._replace(waiting=lost[e.variant][0], failed=lost[e.variant][1]) for e in effects)

    sizes = _sizes(plan.reference, backend, pairs, planned)
    return Findings(
        backend,
        tuple(_summary(name, runs) for name, runs in groups.items()),
        counted(ends),
        counted(family([_along(name, backend, of, planned, "step", kind) for name, of in pairs.items()])),
        counted(family([_along(name, backend, of, planned, "seconds", kind) for name, of in pairs.items()])),
        tuple(s._replace(equal=counted([s.equal])[0]) if s.equal else s for s in sizes),
        pooled_spread([one.paired for one in ends]),
        tuple(doubts),
    )


def _summary(name: str, runs: list[Result]) -> VariantSummary:
    def mean(field: str) -> float | None:
        values = [getattr(r, field) for r in runs if getattr(r, field) is not None]
        return fmean(values) if values else None

    figures = [r.bpb for r in runs if r.bpb is not None]
    return VariantSummary(
        name, len(runs), mean("bpb"), stdev(figures) if len(figures) > 1 else None, mean("bytes"),
        runs[0].parameters if runs else None, mean("tokens_per_second"), mean("seconds"),
    )  # fmt: skip


def _bpb(pairs: Sequence[SeedPair]) -> list[tuple[int, float, float]]:
    return [(a.seed, float(a.bpb or 0.0), float(b.bpb or 0.0)) for a, b in pairs]


def _lost(outcome: Results, name: str, backend: str) -> tuple[int, int]:
    """Return how many seeds of a variant are (still to come, failed), by its runs and those of the reference."""
    states: dict[int, set[str]] = {}
    for r in outcome.results:
        if r.backend == backend and r.variant in (name, outcome.plan.reference):
            states.setdefault(r.seed, set()).add(r.status)
    failed = sum("failed" in kinds for kinds in states.values())
    return sum(bool(kinds & {"waiting", "running"}) and "failed" not in kinds for kinds in states.values()), failed


def _along(name: str, backend: str, pairs: list[SeedPair], planned: int, field: str, budget: str) -> VariantEffect:
    """Return the effect at the last `step` or `seconds` that all runs of these pairs reached."""
    runs = [run for pair in pairs for run in pair]
    ends = [float(getattr(r, "steps" if field == "step" else "seconds") or 0) for r in runs]
    # Runs that ended at the same place are held against each other by what they stored, which is what counts.
    same = ends and max(ends) <= min(ends) * (1 + (0 if field == "step" else SAME_TIME))
    if same and (field == "step" or budget == "seconds"):
        return effect(name, backend, _bpb(pairs), planned, at=f"{_place(field, min(ends))}, the end")
    reading = _at(runs, field)
    if reading is None:
        return effect(name, backend, [], planned, note="no curve that all of these runs have" if pairs else "")
    basis, place, values = reading
    points = [(a.seed, values[2 * i], values[2 * i + 1]) for i, (a, _) in enumerate(pairs)]
    return effect(name, backend, points, planned, basis, _place(field, place))


def _place(field: str, value: float) -> str:
    return f"step {value:,.0f}" if field == "step" else f"{value:,.1f} s"


def _at(runs: list[Result], field: str) -> tuple[str, float, list[float]] | None:
    """Return (basis, place, each run's value there): validation estimates if they lie close enough, else training.

    A learning curve bends, so a straight line between far points lies above it: estimates further apart than a
    quarter of the way to the place are not used.
    """
    for basis, column in (("validation estimates", "val_bpb"), ("training curves", "train_bpb")):
        lines = [curve(r, field, column) for r in runs]
        if not lines or any(len(xs) < 2 for xs, _ in lines):
            continue
        place = min(xs[-1] for xs, _ in lines)
        if place <= 0 or place < max(xs[0] for xs, _ in lines):
            continue
        if column == "val_bpb" and any(_gap(xs, place) > place / 4 for xs, _ in lines):
            continue
        read = _read_off if column == "train_bpb" else np.interp
        return basis, place, [float(read(place, xs, ys)) for xs, ys in lines]
    return None


def _read_off(place: float, xs: list[float], ys: list[float]) -> float:
    """Return the height, at a place, of the straight line that fits the quarter of the way before it.

    Points of a training curve are single batches, which differ by more than variants do. Fewer than three: between
    neighbours.
    """
    near = [(x, y) for x, y in zip(xs, ys, strict=True) if 0.75 * place <= x <= place]
    if len(near) < 3:
        return float(np.interp(place, xs, ys))
    slope, level = np.polyfit([x - place for x, _ in near], [y for _, y in near], 1)
    return float(level)


def curve(run: Result, field: str, column: str) -> tuple[list[float], list[float]]:
    """Return (steps or seconds, bits per byte) of a run's finite points of `val_bpb` or `train_bpb`."""
    points = [(getattr(p, field), getattr(p, column)) for p in run.curve]
    finite = [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)]
    return [x for x, _ in finite], [y for _, y in finite]


def _gap(xs: list[float], place: float) -> float:
    """Return how far apart the points on both sides of a place are; 0 at a point."""
    after = next(i for i, x in enumerate(xs) if x >= place)
    return 0.0 if xs[after] == place else xs[after] - xs[after - 1]


def _sizes(reference: str, backend: str, pairs: dict[str, list[SeedPair]], planned: int) -> tuple[Size, ...]:
    sizes = []
    for name, of in pairs.items():
        sized = [p for p in of if p[0].bytes and p[1].bytes]
        if not sized:
            sizes.append(Size(name, None, None, None, "no pair of finished artifacts"))
            continue
        ours, base = fmean(float(a.bytes or 0) for a, _ in sized), fmean(float(b.bytes or 0) for _, b in sized)
        if abs(ours - base) <= SAME_SIZE * base:
            sizes.append(
                Size(name, ours - base, None, effect(name, backend, _bpb(sized), planned), f"{reference}, as big")
            )
            continue
        change = fmean(a - b for _, a, b in _bpb(sized))
        equal, note = _rival(name, reference, backend, sized, ours, base, pairs, planned)
        sizes.append(Size(name, ours - base, change / (ours - base) * 100_000, equal, note))
    adjusted = iter(family([one.equal or effect(one.variant, backend, [], planned) for one in sizes]))
    return tuple(one._replace(equal=e if one.equal else None) for one, e in zip(sizes, adjusted, strict=True))


def _rival(
    name: str, reference: str, backend: str, sized: list[SeedPair], ours: float, base: float,
    pairs: dict[str, list[SeedPair]], planned: int,
) -> tuple[VariantEffect | None, str]:  # fmt: skip
    """Compare a variant with the best score that the reference and one other variant reach at its size.

    That is the straight line, seed by seed, from the reference to a variant at least as far away in size; where bytes
    did not help that other variant, it is the reference itself, which a bigger budget also holds.
    """
    best: tuple[float, list[tuple[int, float, float]], str] | None = None
    mine = {a.seed: a for a, _ in sized}
    for other, of in pairs.items():
        common = [(a, b) for a, b in of if a.bytes and b.bytes and a.seed in mine]
        if other == name or len(common) < len(sized):
            continue
        far = fmean(float(a.bytes or 0) for a, _ in common)
        share = (ours - base) / (far - base) if far != base else math.inf
        if not 0 < share <= 1:
            continue
        line = [(seed, float(mine[seed].bpb or 0), b + share * (a - b)) for seed, a, b in _bpb(common)]
        level = fmean(value for _, _, value in line)
        if best is None or level < best[0]:
            best = level, line, f"line from {reference} to {other}"
    if best is None:
        return None, "not comparable: no variant of the same size"
    if ours > base and best[0] > fmean(b for _, _, b in _bpb(sized)):
        return effect(name, backend, _bpb(sized), planned), f"{reference}, as more bytes did not help others"
    return effect(name, backend, best[1], planned), best[2]
