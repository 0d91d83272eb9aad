"""The pictures of an ablation: differences with intervals, learning curves with bands, bytes against bits per byte."""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from core.ablation.report.wording import NONE, number
from core.ablation.stats.effects import VariantEffect
from core.ablation.stats.findings import curve, scored
from core.ablation.stats.results import Result, Results
from core.files import new_file

COLOURS = {
    "ink": ("#1c2430", "#e6e9ee"), "muted": ("#586274", "#a3adbb"), "grid": ("#dde2ea", "#343c48"),
    "page": ("#ffffff", "#14181f"), "box": ("#f5f7fa", "#1c222b"), "better": ("#0b6bcb", "#6cb6ff"),
    "worse": ("#b3470b", "#ff9a5c"), "noise": ("#66707f", "#98a2b1"),
}  # fmt: skip
"""Name -> (on a light page, on a dark page); words in each are readable on both `page` and `box`."""
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": LIGHT["grid"], "axes.formatter.useoffset": False, "axes.grid": True,
    "axes.labelcolor": LIGHT["muted"], "axes.spines.right": False, "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "grid.color": LIGHT["grid"], "svg.fonttype": "none",
    "svg.hashsalt": "ablation", "text.color": LIGHT["muted"], "text.parse_math": False,
    "xtick.color": LIGHT["grid"], "xtick.labelcolor": LIGHT["muted"], "ytick.color": LIGHT["grid"],
    "ytick.labelcolor": LIGHT["muted"],
}  # fmt: skip
"""Of matplotlib, for whoever draws and writes pictures."""
PHONE = 500
"""Pixels below which a picture is for a phone."""
BINS = 60
"""Most places of a learning curve that a picture shows."""
SKIPPED = 0.25
"""Share of the training that curves leave out at the start, where bits per byte fall steeply."""

Part = tuple[np.ndarray, np.ndarray]
"""(steps or seconds, bits per byte)."""


class Picture(NamedTuple):
    """A drawing of matplotlib's and what it shows in one sentence, for those who cannot see it."""

    figure: Any
    words: str


class Line(NamedTuple):
    """A learning curve: mean, lowest and highest over seeds at each place."""

    name: str
    xs: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def css() -> str:
    """Return the colours as CSS variables, for light and dark pages."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def svg(picture: Picture) -> str:
    """Return a picture as an SVG element for a page that has `css()`; every word in it is escaped."""
    file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    picture.figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    picture.figure.set_layout_engine("none")  # the places stay: to find them takes as long as to draw
    text = file.getvalue().partition("<svg ")[2]
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # a page has several pictures, and an id once
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return f'<svg role="img" aria-label="{escape(picture.words)}" {text}'


def png(picture: Picture, path: Path) -> None:
    """Write a picture as PNG, on white."""
    with new_file(path) as file:
        picture.figure.savefig(file, format="png", dpi=144)


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """Return an empty figure of so many pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 96, height / 96), layout=layout)


def short(name: str, width: int) -> str:
    """Shorten a name for a picture of so many pixels by leaving out the middle, since names often share their start."""
    letters = 14 if width < PHONE else 26
    tail = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[: letters - 1 - tail]}…{name[-tail:]}"


def difference(effects: Sequence[VariantEffect], reference: str, width: int) -> Picture:
    """Draw each variant's mean difference with its 95 % interval and every seed; left of 0 is better.

    An interval or a difference too wide for a scale on which the others can be read ends in an arrow.
    """
    figure, limit = _figure(width, 50 + 36 * len(effects)), _limit(effects)
    axes = figure.add_subplot()
    axes.set(xlim=(-limit, limit), ylim=(len(effects) - 0.5, -0.5))
    axes.set_title("◂ better | worse ▸", fontsize="medium")
    axes.grid(visible=False, axis="y")
    axes.axvline(0.0, color=LIGHT["muted"], linewidth=1)
    axes.locator_params(axis="x", nbins=4 if width < PHONE else 8)
    axes.set_yticks(range(len(effects)), [short(one.variant, width) for one in effects], color=LIGHT["ink"])
    for y, one in enumerate(effects):
        colour = LIGHT[one.verdict if one.verdict in ("better", "worse") else "noise"]
        words = number(one.paired.mean, sign=True) if one.paired else NONE
        words += "" if width < PHONE else f"  {one.verdict.split(':')[0]}"
        axes.text(1.02, y, words, color=colour, va="center", transform=axes.get_yaxis_transform())
        _effect(axes, one, y, limit, colour)
    basis = f"against {reference}, mean and 95 % interval, a ring for each seed"
    summary = "; ".join(f"{e.variant} {e.paired.mean:+.4f}, {e.verdict}" for e in effects if e.paired)
    return Picture(figure, f"Differences in bits per byte {basis}. {summary}")


def _effect(axes: Any, one: VariantEffect, y: float, limit: float, colour: str) -> None:
    if one.paired is None:
        return
    test, above, below = one.paired, y - 0.12, y + 0.2
    for value in (test.mean,) if abs(test.mean) > limit else (test.low, test.high):
        if value is not None and abs(value) > limit:
            arrow = ">" if value > 0 else "<"
            axes.plot(math.copysign(limit, value), above, arrow, color=colour, clip_on=False)
    if abs(test.mean) > limit:
        return
    if test.low is not None:
        axes.plot([test.low, test.high], [above, above], color=colour, linewidth=2, marker="|", label="interval")
    axes.plot(test.mean, above, "o", color=colour)
    rings = {"markerfacecolor": LIGHT["page"], "markersize": 5, "label": "seeds"}
    axes.plot(one.differences, [below] * len(one.differences), "o", color=colour, **rings)


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
    across = min(len(others), 3) if width >= PHONE else 1 if len(others) < 4 else 2
    down = -(-len(others) // across)
    height = 40 + 190 * down
    figure = _figure(width, height, layout=None)
    edges = {"left": 52 / width, "right": 1 - 14 / width, "bottom": 60 / height, "top": 1 - 20 / height}
    figure.subplots_adjust(**edges, wspace=56 * across / (width - 10 - 56 * across), hspace=0.32)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, one in zip(panels, others, strict=False):
        drawn = [base] if one is base else [base, one]
        for line, colour in zip(drawn, ("muted", "better"), strict=False):
            panel.fill_between(line.xs, line.low, line.high, color=LIGHT[colour], alpha=0.18, linewidth=0)
            panel.plot(line.xs, line.mean, color=LIGHT[colour], linewidth=1.5)
        scale = near if one in near else drawn
        low, high = min(min(line.low) for line in scale), max(max(line.high) for line in scale)
        room = (high - low) * 0.05 or 0.01
        panel.set(xlim=(min(line.xs[0] for line in scale), max(line.xs[-1] for line in scale)))
        panel.set(ylim=(low - room, high + room))
        panel.locator_params(nbins=4)
        title = short(one.name, width) + ("" if one in near else " *")
        panel.set_title(title, loc="left", fontsize="medium", color=LIGHT["better"])
    for panel in panels[len(others) :]:
        panel.remove()
    starred = "; * own scale" if len(near) < len(others) + (base not in others) else ""
    figure.supxlabel(field + starred, fontsize="medium")
    return Picture(figure, f"Bits per byte against {field}: {', '.join(one.name for one in lines)}")


def _far(one: Line, base: Line) -> float:
    return abs(one.mean[-1] - base.mean[-1])


def sizes(points: Sequence[tuple[str, float, float, str]], width: int) -> Picture:
    """Draw bits per byte against bytes: (name, bytes, bits per byte, colour) each, the reference first.

    Names stand beside the points; a variant far above or below all others is an arrow at the edge.
    """
    height = max(230 if width < PHONE else 300, 60 + 19 * len(points))
    figure = _figure(width, height)
    axes = figure.add_subplot(xlabel="artifact, thousand bytes", ylabel="bits per byte")
    most = _near([abs(p[2] - points[0][2]) for p in points[1:]])
    shown = [p for p in points if abs(p[2] - points[0][2]) <= most]
    axes.scatter([p[1] / 1e3 for p in shown], [p[2] for p in shown], c=[LIGHT[p[3]] for p in shown])
    axes.margins(0.06, 0.08)
    axes.locator_params(axis="x", nbins=4 if width < PHONE else 8)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    placed = sorted(points, key=lambda p: -p[2])
    inside = [min(max((p[2] - low) / (high - low), 0.0), 1.0) for p in placed]
    levels = _apart([1 - share for share in inside], 19 / (height - 60), 0.0, 1.0)
    for (name, size, bpb, colour), share, level in zip(placed, inside, levels, strict=True):
        if not low <= bpb <= high:
            axes.plot(size / 1e3, share, "^v"[share == 0], color=LIGHT[colour], transform=axes.get_xaxis_transform())
            name = f"{name} {bpb:.2f}"
        axes.annotate(
            short(name, width), (size / 1e3, share), (1.03, 1 - level),
            xycoords=axes.get_xaxis_transform(), textcoords="axes fraction", va="center", color=LIGHT[colour],
            arrowprops={"arrowstyle": "-", "color": LIGHT["grid"], "relpos": (0, 0.5)},
        )  # fmt: skip
    text = "; ".join(f"{name} {x:,.0f} bytes {y:.4f}" for name, x, y, _ in points)
    return Picture(figure, f"Bits per byte against bytes of the artifact. {text}")


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
