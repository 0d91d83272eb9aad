"""The picture of `skc compare`: the curves, and below them each run's difference from the first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.compare.pair import RunPair, positions, trained_on
from core.files import new_file
from core.training.report import MARGIN, whole_ticks
from core.training.run import Run

COLOURS = ("#4c72b0", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd", "#8c8c8c", "#dd8452")
AXES = {"step": "step", "tokens": "tokens", "share": "share of the schedule"}
SMOOTH = 25
"""The smoothed difference is a running mean over one in so many of its windows."""


def draw(runs: list[Run], pairs: list[RunPair], path: Path) -> None:
    """Draw training curves and validation estimates above, differences with their mean at the end below."""
    from matplotlib.figure import Figure

    by = pairs[0].by
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 3))
    name = "train/bpb" if all(positions(run, "train/bpb", by) for run in runs) else "train/loss"
    for i, run in enumerate(runs):
        _curve(above, run, by, name, COLOURS[i % len(COLOURS)])
    above.set_ylabel("bits per byte\n(points: validation)" if name == "train/bpb" else "nats per token")
    drawn = [_difference(below, pair, COLOURS[(i + 1) % len(COLOURS)]) for i, pair in enumerate(pairs)]
    below.axhline(0.0, color="#444444", linewidth=0.8)
    if any(drawn):
        below.set_ylim(-1.1 * max(drawn), 1.1 * max(drawn))
    below.set_ylabel(f"less the first,\n{pairs[0].unit}")
    below.set_xlabel(AXES[by])
    above.margins(y=MARGIN)
    if by != "share":
        whole_ticks(below)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small", ncols=2 if axes is below else 1, loc="best")
    with new_file(path) as file:
        figure.savefig(file, format="png")


def _curve(axes: Any, run: Run, by: str, name: str, colour: str) -> None:
    train, val = positions(run, name, by), positions(run, "val/bpb", by)
    text = plain(f"{run.path.name[:60]} ({trained_on(run)})")
    if train:
        means, ends = [row[name] for row in train.values()], np.array([*train], np.float64)
        middles = middle(np.append(0.0, ends[:-1]), ends)
        size = max(1, len(means) // (4 * SMOOTH))
        if size > 1:
            axes.plot(middles, means, color=colour, linewidth=0.4, alpha=0.25)
        axes.plot(_running(middles, size), _running(means, size), color=colour, linewidth=1.2, alpha=0.8, label=text)
    if val and name == "train/bpb":
        values, errors = zip(*((row["val/bpb"], row.get("val/error", 0.0)) for row in val.values()), strict=True)
        style: dict[str, Any] = {"color": colour, "fmt": "o", "markersize": 4, "capsize": 3, "linewidth": 1.0}
        axes.errorbar([*val], values, yerr=errors, label=None if train else text, **style)


def plain(text: str) -> str:
    """Return text that matplotlib shows as it is: between two dollar signs it would read a formula."""
    return text.replace("$", r"\$")


def _difference(axes: Any, pair: RunPair, colour: str) -> float:
    """Draw one difference and return how far the picture has to reach; 0 where there is none."""
    over, gap = pair.over, pair.curves
    gaps, middles = over.second - over.first, middle(over.starts, over.ends)
    if not len(gaps):
        return 0.0
    size = max(1, len(gaps) // SMOOTH)
    axes.plot(middles, gaps, color=colour, linewidth=0.5, alpha=0.35)
    smooth = _running(gaps, size)
    axes.plot(_running(middles, size), smooth, color=colour, linewidth=1.6)
    if gap.same_until:
        text = f"rounding until {_short(gap.same_until, pair.by)}"
        axes.axvline(gap.same_until, color=colour, linewidth=1.0, linestyle=":", label=text)
    if gap.end is not None and gap.end_from is not None:
        spread = gap.end_spread or 0.0
        text = f"end: {gap.end:+.4f}" + (f" ± {spread:.4f}" if spread else "")
        place = [gap.end_from, over.ends[-1]]
        axes.plot(place, [gap.end] * 2, color=colour, linewidth=1.2, linestyle="--", label=text)
        axes.fill_between(place, gap.end - spread, gap.end + spread, color=colour, alpha=0.15, linewidth=0)
    return float(max([*np.abs(smooth), np.quantile(np.abs(gaps), 0.98), gap.floor]))


def middle(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the middle of every window, where its mean is drawn."""
    return (starts + ends) / 2


def _running(values: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    return np.convolve(values, np.full(size, 1 / size), "valid")


def _short(place: float, by: str) -> str:
    return f"{100 * place:.3g} %" if by == "share" else f"{place:,.0f}"
