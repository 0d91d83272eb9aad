"""The pictures of an ablation: differences with intervals, learning curves with bands, bytes against bits per byte."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from core.ablation.report.charts import LETTER, SIZE, Mark, Picture, Spot, label, number, short, ticks
from core.ablation.stats.effects import VariantEffect
from core.ablation.stats.findings import curve, scored
from core.ablation.stats.results import Result, Results

BINS = 60
"""Most places of a learning curve that a picture shows."""
SKIPPED = 0.25
"""Share of the training that curves leave out at the start, where bits per byte fall steeply."""


Part = tuple[np.ndarray, np.ndarray]
"""(steps or seconds, bits per byte)."""


class Line(NamedTuple):
    """A learning curve: mean, lowest and highest over seeds at each place."""

    name: str
    xs: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def difference(effects: Sequence[VariantEffect], reference: str, width: int) -> Picture:
    """Draw each variant's mean difference with its 95 % interval and every seed; left of 0 is better.

    An interval or a difference too wide for a scale on which the others can be read ends in an arrow.
    """
    narrow = width < 500
    left, right = (10, 10) if narrow else (min(230, 20 + _longest([e.variant for e in effects])), 205)
    row, top = (50, 50) if narrow else (34, 46)
    bottom = top + row * len(effects)
    limit = _limit(effects)
    middle, reach = (left + width - right) / 2, (width - right - left) / 2 - 8

    def place(value: float) -> float:
        return middle + max(-1.0, min(1.0, value / limit)) * reach

    marks = []
    marks += [Mark("words", "better", ((middle - 8, 18),), SIZE, "◂ better", "end")]
    marks += [Mark("words", "worse", ((middle + 8, 18),), SIZE, "worse ▸")]
    places = ticks(-limit, limit, 5 if narrow else 9)
    for value in places:
        words = label(value, places[1] - places[0], True)
        marks.append(Mark("words", "muted", ((place(value), top - 12),), 12, words, "middle"))
    for i, one in enumerate(effects):
        y, base = top + row * (i + 0.5), top + row * (i + 0.5) + 4
        colour = {"better": "better", "worse": "worse"}.get(one.verdict, "noise")
        value = number(one.paired.mean, sign=True) if one.paired else "–"
        if narrow:
            y, base = y + 8, y - 10
            marks.append(Mark("words", "ink", ((left, base),), SIZE, short(one.variant, width - 95)))
            marks.append(Mark("words", colour, ((width - right, base),), SIZE, value, "end"))
        else:
            marks.append(Mark("words", "ink", ((left - 8, base),), SIZE, short(one.variant, left - 18), "end"))
            words = f"{value}  {one.verdict.split(':')[0]}" if one.paired else one.verdict
            marks.append(Mark("words", colour, ((width - right + 12, base),), SIZE, words))
        for tick in places:  # a piece each, so that none runs through the names on a phone
            ends = (place(tick), y - 17), (place(tick), y + 17)
            marks.append(Mark("line", "grid" if tick else "muted", ends, 1 if tick else 1.5))
        marks += _effect(one, place, y, limit, colour)
    basis = f"against {reference}, mean and 95 % interval, a ring for each seed"
    summary = "; ".join(f"{e.variant} {e.paired.mean:+.4f}, {e.verdict}" for e in effects if e.paired)
    return Picture(width, bottom + 8, tuple(marks), f"Differences in bits per byte {basis}. {summary}")


def _effect(one: VariantEffect, place: Callable[[float], float], y: float, limit: float, colour: str) -> list[Mark]:
    if one.paired is None:
        return []
    mean = one.paired.mean
    if abs(mean) > limit:
        return [_arrow(place(mean), y, math.copysign(1, mean), colour, 3)]
    marks = []
    if one.paired.low is not None and one.paired.high is not None:
        ends = place(one.paired.low), place(one.paired.high)
        marks.append(Mark("line", colour, ((ends[0], y - 4), (ends[1], y - 4)), 2.5))
        for x, value, side in ((ends[0], one.paired.low, -1), (ends[1], one.paired.high, 1)):
            cap = Mark("line", colour, ((x, y - 9), (x, y + 1)), 2)
            marks.append(_arrow(x, y - 4, side, colour, 2) if abs(value) > limit else cap)
    for seed, value in zip(one.seeds, one.differences, strict=True):
        marks.append(Mark("ring", colour, ((place(value), y + 8),), 3, f"{one.variant}, seed {seed}: {value:+.4f}"))
    return [*marks, Mark("dot", colour, ((place(mean), y - 4),), 5, f"{one.variant}: mean {mean:+.4f}")]


def _arrow(x: float, y: float, side: float, colour: str, width: float) -> Mark:
    return Mark("line", colour, ((x - side * 7, y - 6), (x, y), (x - side * 7, y + 6)), width)


def _limit(effects: Sequence[VariantEffect]) -> float:
    """Return the end of the scale: all seeds of variants that are not far from the others, intervals up to 3 times."""
    points = _near([max(abs(d) for d in e.differences) for e in effects if e.paired])
    shown = [e.paired for e in effects if e.paired and abs(e.paired.mean) <= points]
    wide = max((max(abs(p.low), abs(p.high or 0.0)) for p in shown if p.low is not None), default=0.0)
    return 1.05 * max(points, min(wide, 3 * points)) or 0.01


def _near(sizes: Sequence[float]) -> float:
    """Return the largest size that is not far from the others; 0 if there are none.

    Far are those of the highest quarter (one at least) from the first on that is over 5 times the one before it.
    """
    order = sorted(sizes)
    for i in range(max(1, len(order) - max(1, len(order) // 4)), len(order)):
        if order[i] > 5 * order[i - 1] > 0:
            return order[i - 1]
    return order[-1] if order else 0.0


def curves(lines: Sequence[Line], field: str, width: int) -> Picture:
    """Draw learning curves with bands over seeds, a panel for each variant with the reference, which comes first.

    The panels share one scale, but for variants that end far from all others.
    """
    base, others = lines[0], lines[1:] or lines
    most = _near([_far(one, base) for one in others])
    near = [base, *(one for one in others if _far(one, base) <= most)]
    across = min(len(others), 3) if width >= 500 else 1 if len(others) < 4 else 2
    wide, high, marks = width / across, 160 if across == 2 else 200, []
    for i, one in enumerate(others):
        x, y = wide * (i % across), (high + 26) * (i // across)
        alone = one not in near
        words = short(one.name, wide - 70) + (" *" if alone else "")
        marks.append(Mark("words", "one", ((x + 46, y + 16),), SIZE, words))
        drawn = [base] if one is base else [base, one]
        marks += _panel(drawn, drawn if alone else near, (x, y + 20, wide, high))
    height = (high + 26) * -(-len(others) // across)
    starred = "; * own scale" if len(near) < len(others) + (base not in others) else ""
    marks.append(Mark("words", "muted", ((width / 2, height + 12),), 12, field + starred, "middle"))
    names = f"Bits per byte against {field}: {', '.join(one.name for one in lines)}"
    return Picture(width, height + 18, tuple(marks), names)


def _far(one: Line, base: Line) -> float:
    return abs(one.mean[-1] - base.mean[-1])


def _panel(lines: Sequence[Line], scale: Sequence[Line], box: tuple[float, float, float, float]) -> list[Mark]:
    """Draw the reference and another line in a box (x, y, width, height), on the scale of all lines of `scale`."""
    x0, y0, w, h = box
    left, right, bottom = x0 + 46, x0 + w - 10, y0 + h - 26
    first, last = min(one.xs[0] for one in scale), max(one.xs[-1] for one in scale)
    low, high = min(min(one.low) for one in scale), max(max(one.high) for one in scale)
    span, room = (last - first) or 1.0, (high - low) * 0.05 or 0.01
    low, high = low - room, high + room

    def spot(x: float, y: float) -> Spot:
        return left + (x - first) / span * (right - left), y0 + 8 + (high - y) / (high - low) * (bottom - y0 - 8)

    up, along = ticks(low, high, 4), ticks(first, last, 4 if w > 250 else 3)
    marks = [Mark("line", "grid", (spot(first, value), spot(last, value))) for value in up]
    for value in up:
        words = label(value, up[1] - up[0])
        marks.append(Mark("words", "muted", ((left - 6, spot(first, value)[1] + 4),), 11, words, "end"))
    for value in along:
        x, words = spot(value, low)[0], label(value, along[1] - along[0] if len(along) > 1 else 1.0)
        marks.append(Mark("words", "muted", ((x, bottom + 17),), 11, words, "end" if x > right - 8 else "middle"))
    for i, one in enumerate(lines):
        colour = "one" if i else "base"
        edge = [spot(x, y) for x, y in zip(one.xs, one.high, strict=True)]
        edge += [spot(x, y) for x, y in zip(one.xs[::-1], one.low[::-1], strict=True)]
        if one.high != one.low:
            marks.append(Mark("area", colour, tuple(edge)))
        marks.append(Mark("line", colour, tuple(spot(x, y) for x, y in zip(one.xs, one.mean, strict=True)), 2))
    return marks


def sizes(points: Sequence[tuple[str, float, float, str]], width: int) -> Picture:
    """Draw bits per byte against bytes: (name, bytes, bits per byte, colour) each, the reference first.

    Names stand beside the points; a variant far above or below all others is an arrow at the edge.
    """
    names = min(0.4 * width, 24 + _longest([name for name, *_ in points]))
    left, right, top = 50, width - names - 22, 22
    bottom = top + max(200 if width < 500 else 260, 19 * len(points))
    most = _near([abs(p[2] - points[0][2]) for p in points[1:]])
    shown = [p for p in points if abs(p[2] - points[0][2]) <= most]
    xs, ys = [p[1] for p in points], [p[2] for p in shown]
    pad = (max(xs) - min(xs)) * 0.06 or max(xs) * 0.05 or 1.0, (max(ys) - min(ys)) * 0.08 or 0.01
    x0, x1, y0, y1 = min(xs) - pad[0], max(xs) + pad[0], min(ys) - pad[1], max(ys) + pad[1]

    def spot(x: float, y: float) -> Spot:
        y = max(y0, min(y1, y))
        return left + (x - x0) / (x1 - x0) * (right - left), top + (y1 - y) / (y1 - y0) * (bottom - top)

    marks = []
    across, up = ticks(x0 / 1e3, x1 / 1e3, 3 if width < 500 else 6), ticks(y0, y1, 6)
    for value in across:
        x = spot(value * 1e3, y0)[0]
        marks.append(Mark("line", "grid", ((x, top), (x, bottom))))
        words = label(value, across[1] - across[0])
        marks.append(Mark("words", "muted", ((x, bottom + 17),), 12, words, "middle"))
    for value in up:
        y = spot(x0, value)[1]
        marks.append(Mark("line", "grid", ((left, y), (right, y))))
        marks.append(Mark("words", "muted", ((left - 6, y + 4),), 12, label(value, up[1] - up[0]), "end"))
    marks.append(Mark("words", "muted", (((left + right) / 2, bottom + 34),), 12, "artifact, thousand bytes", "middle"))
    marks.append(Mark("words", "muted", ((4, 12),), 12, "bits per byte"))
    placed = sorted(points, key=lambda p: -p[2])
    levels = _apart([spot(*p[1:3])[1] for p in placed], 18, top, bottom)
    for point, level in zip(placed, levels, strict=True):
        name, x, y, colour = point
        at = spot(x, y)
        marks.append(Mark("line", "grid", (at, (right + 4, level), (right + 14, level)), 1))
        if point in shown:
            marks.append(Mark("dot", colour, (at,), 5, f"{name}: {x:,.0f} bytes, {y:.4f}"))
        else:
            side = 7 if at[1] == top else -7
            marks.append(Mark("line", colour, ((at[0] - 6, at[1] + side), at, (at[0] + 6, at[1] + side)), 3))
        end = "" if point in shown else f" {y:.2f}"
        room = names - len(end) * SIZE * LETTER
        marks.append(Mark("words", colour, ((right + 18, level + 4),), SIZE, short(name, room) + end))
    marks.sort(key=lambda m: m.shape in ("dot", "words"))
    text = "; ".join(f"{name} {x:,.0f} bytes {y:.4f}" for name, x, y, _ in points)
    return Picture(width, math.ceil(bottom) + 42, tuple(marks), f"Bits per byte against bytes of the artifact. {text}")


def _apart(levels: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Return sorted levels pushed at least `gap` apart, as near to their places as that and the box allow."""
    moved: list[float] = []
    for level in levels:
        moved.append(max(level, moved[-1] + gap) if moved else max(level, top))
    end = bottom
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], end)
        end = moved[i] - gap
    return moved


def _longest(names: Sequence[str]) -> int:
    return math.ceil(max((len(name) for name in names), default=0) * SIZE * LETTER)


def learning(outcome: Results, backend: str, field: str) -> tuple[str, list[Line], list[Line]]:
    """Return (what the figures are, curves of finished runs, their paired differences) against `step` or `seconds`.

    The reference comes first; against itself its difference is 0. Validation estimates where every run has at least
    four after the part left out, else training curves, whose points are averaged in groups to at most BINS. No lines
    where the reference has none.
    """
    plan = outcome.plan
    names = [plan.reference, *(name for name in plan.variants if name != plan.reference)]
    groups = {name: scored(outcome, name, backend) for name in names}
    runs = [run for of in groups.values() for run in of]
    for basis, column, least in (("validation estimates", "val_bpb", 4), ("training curves", "train_bpb", 2)):
        first = SKIPPED * max((max(curve(run, field, column)[0], default=0.0) for run in runs), default=0.0)
        parts = {name: {r.seed: _part(r, field, column, first) for r in of} for name, of in groups.items() if of}
        if plan.reference in parts and all(len(xs) >= least for of in parts.values() for xs, _ in of.values()):
            base = parts[plan.reference]
            lines = [_line(name, list(of.values()), None) for name, of in parts.items()]
            both = {name: [seed for seed in of if seed in base] for name, of in parts.items()}
            gaps = [
                _line(name, [parts[name][s] for s in seeds], [base[s] for s in seeds])
                for name, seeds in both.items()
                if seeds
            ]
            return basis, lines, gaps
    return "", [], []


def _part(run: Result, field: str, column: str, first: float) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = (np.array(values) for values in curve(run, field, column))
    xs, ys = xs[xs >= first], ys[xs >= first]
    if len(xs) > BINS:
        xs, ys = (np.array([part.mean() for part in np.array_split(values, BINS)]) for values in (xs, ys))
    return xs, ys


def _line(name: str, parts: Sequence[Part], less: Sequence[Part] | None) -> Line:
    """Return mean, lowest and highest of several curves; with `less`, of their differences from those."""
    every = [*parts, *(less or [])]
    grid = parts[0][0]
    if any(len(xs) != len(grid) or (xs != grid).any() for xs, _ in every):
        grid = np.linspace(max(xs[0] for xs, _ in every), min(xs[-1] for xs, _ in every), max(len(grid), 20))
    values = np.array([np.interp(grid, xs, ys) for xs, ys in parts])
    if less is not None:
        values = values - np.array([np.interp(grid, xs, ys) for xs, ys in less])
    columns = (values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    return Line(name, tuple(grid.tolist()), *(tuple(column.tolist()) for column in columns))
