"""The pictures of a search: bits per byte against the trial, and against each searched field."""

import math
from statistics import median
from typing import Any, NamedTuple

from core.ablation.report.charts import SIZE, Mark, Picture, Spot, label, number, short, ticks
from core.ablation.report.search_wording import shown, title
from core.ablation.search.search import Searched, Trial
from core.ablation.search.space import Field

REACH = 4.0
"""A scale ends this many times as far above the best figure as the middle one is: far ones are arrows at the edge."""


class Box(NamedTuple):
    """Where the figures of a panel are, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


def draw(searched: Searched, width: int) -> dict[str, Picture]:
    """Return the pictures, `search` and `search fields`; none where no trial has a figure."""
    if searched.best is None:
        return {}
    return {"search": progress(searched, width), "search fields": fields(searched, width)}


def progress(searched: Searched, width: int) -> Picture:
    """Draw every trial's bits per byte in order, with the best so far."""
    trials, best = searched.trials[1:], searched.best
    box = Box(58, 44, width - 18, 44 + (220 if width < 500 else 260))
    low, high = _scale(searched)
    marks = _levels(box, low, high)
    reach = max(len(trials) - 1, 1)

    def spot(position: int, bpb: float) -> Spot:
        x = box.left + 12 + position / reach * (box.right - box.left - 24)
        return x, _height(box, low, high, bpb)

    for tick in ticks(1, max(len(trials), 2), 6 if width < 500 else 12):
        if tick == int(tick) and 1 <= tick <= len(trials):
            place = spot(int(tick) - 1, low)[0], box.bottom + 18
            marks.append(Mark("words", "muted", (place,), 12, str(int(tick)), "middle"))
    start = searched.start.bpb
    if start is not None and low <= start <= high:
        y = _height(box, low, high, start)
        marks.append(Mark("dashes", "base", ((box.left, y), (box.right, y)), 1.5))
    stairs: list[Spot] = []
    lowest = math.inf
    for i, trial in enumerate(trials):
        if trial.bpb is not None and trial.bpb < lowest:
            if stairs:
                stairs.append((spot(i, lowest)[0], stairs[-1][1]))
            lowest = trial.bpb
            stairs.append(spot(i, min(lowest, high)))
    stairs.append((spot(len(trials) - 1, lowest)[0], stairs[-1][1]))
    marks.append(Mark("line", "one", tuple(stairs), 2))
    for i, trial in enumerate(trials):
        marks += _mark(trial, spot(i, high if trial.bpb is None else trial.bpb), box, trial is best)
    assert best is not None
    x, y = spot(best.number - 1, best.bpb or 0.0)
    side = "end" if x > (box.left + box.right) / 2 else "start"
    words = f"{title(best)}: {number(best.bpb)}, selected"
    marks.append(Mark("words", "one", ((x + (-10 if side == "end" else 10), y + 19),), SIZE, words, side))
    marks.append(Mark("words", "muted", ((4, 14),), 12, "bits per byte"))
    marks += _legend(searched, width, high)
    marks.append(Mark("words", "muted", (((box.left + box.right) / 2, box.bottom + 36),), 12, "trial", "middle"))
    said = f"Bits per byte of {len(trials)} trials in order. Best: {title(best)}, {best.bpb:.4f}, {_begin(searched)}"
    return Picture(width, math.ceil(box.bottom) + 44, tuple(marks), said)


def fields(searched: Searched, width: int) -> Picture:
    """Draw every trial's bits per byte against each field, a panel for each, all on one scale."""
    space = searched.search.space
    narrow = width < 500
    across = (1 if len(space) < 4 else 2) if narrow else 2 if len(space) == 4 else min(len(space), 3)
    wide, high, marks = width / across, 170 if narrow and across == 2 else 210, []
    for i, field in enumerate(space):
        x, y = wide * (i % across), (high + 22) * (i // across)
        marks += _panel(searched, field, (x, y, wide, high))
    best = searched.best
    assert best is not None
    said = "; ".join(f"{name} {shown(value)}" for name, value in best.settings.items())
    rows = -(-len(space) // across)
    return Picture(
        width, (high + 22) * rows, tuple(marks), f"Bits per byte against each searched field. Best at {said}"
    )


def _panel(searched: Searched, field: Field, place: tuple[float, float, float, float]) -> list[Mark]:
    x0, y0, w, h = place
    box = Box(x0 + 58, y0 + 30, x0 + w - 14, y0 + h - 16)
    low, high = _scale(searched)
    fits = short(field.name, w - 64) == field.name
    marks = [Mark("words", "ink", ((x0 + 58, y0 + 16),), SIZE, field.name if fits else short(_last(field), w - 64))]
    marks += _levels(box, low, high)
    marks += _axis(field, box)
    for trial in sorted(searched.trials[1:], key=lambda t: t is searched.best):
        x = _along(field, trial.settings[field.name], box, trial.number)
        y = box.top if trial.bpb is None else _height(box, low, high, trial.bpb)
        marks += _mark(trial, (x, y), box, trial is searched.best, 4)
    start = searched.start
    if start.bpb is not None and start.bpb <= high and _inside(field, start.settings[field.name]):
        at = _along(field, start.settings[field.name], box, 0), _height(box, low, high, start.bpb)
        marks.append(Mark("ring", "ink", (at,), 5, f"start: {start.bpb:.4f}"))
    return marks


def _last(field: Field) -> str:
    return field.name.partition(".")[2]


def _inside(field: Field, value: Any) -> bool:
    """Whether a panel has a place for a value: the start's may lie outside the space."""
    if field.kind == "values":
        return any(repr(v) == repr(value) for v in field.values)
    return type(value) in (int, float) and field.low <= value <= field.high


def _along(field: Field, value: Any, box: Box, number: int) -> float:
    """Return where a value is on a panel; trials with one of several values stand a little apart."""
    left, right = box.left + 12, box.right - 12
    if field.kind == "values":
        slot = (right - left) / len(field.values)
        place = next(i for i, v in enumerate(field.values) if repr(v) == repr(value))
        return left + slot * (place + 0.5 + 0.5 * (number * 0.618 % 1 - 0.5))
    of = math.log if field.log else float
    share = (of(value) - of(field.low)) / (of(field.high) - of(field.low))
    return left + share * (right - left)


def _axis(field: Field, box: Box) -> list[Mark]:
    y = box.bottom + 18
    if field.kind == "values":
        room = (box.right - box.left - 24) / len(field.values)
        places = [(box.left + 12 + room * (i + 0.5), shown(value)) for i, value in enumerate(field.values)]
        return [Mark("words", "muted", ((x, y),), 11, short(words, room - 4, 11), "middle") for x, words in places]
    if field.log:
        values = _decades(field.low, field.high, 5 if box.right - box.left > 180 else 2)
        words = [shown(float(value)).replace("-", "−") for value in values]
    else:
        values = ticks(field.low, field.high, 4 if box.right - box.left > 180 else 3)
        values = [v for v in values if field.kind == "float" or v == int(v)]
        if field.step and (field.size or 0) <= 5:
            values = [field.low + i * field.step for i in range(field.size or 0)]
        words = [label(v, values[1] - values[0] if len(values) > 1 else 1.0) for v in values]
    made = []
    for value, text in zip(values, words, strict=True):
        x = _along(field, value, box, 0)
        made.append(Mark("line", "grid", ((x, box.top), (x, box.bottom))))
        made.append(Mark("words", "muted", ((x, y),), 11, text, "middle"))
    return made


def _decades(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` of 1, 2, 5 times powers of ten, 1 and 3 times, or powers alone, from low to high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts, step in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
        made = [float(f"{part}e{power}") for power in range(first, last + 1, step) for part in parts]
        made = [value for value in made if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(made) <= most:
            return made
    return []


def _mark(trial: Trial, at: Spot, box: Box, best: bool, radius: float = 4.5) -> list[Mark]:
    """Draw a trial: a dot, an arrow where it is above the scale, a cross where it failed."""
    x, y = at
    if trial.status == "failed":
        return [
            Mark("line", "worse", ((x - 5, box.top - 5), (x + 5, box.top + 5)), 2),
            Mark("line", "worse", ((x - 5, box.top + 5), (x + 5, box.top - 5)), 2),
        ]
    if trial.bpb is None:
        return []
    if y < box.top:
        return [Mark("line", "noise", ((x - 5, box.top + 6), (x, box.top), (x + 5, box.top + 6)), 2.5)]
    colour = "one" if best else "noise"
    return [Mark("dot", colour, (at,), radius + 2 * best, f"{title(trial)}: {trial.bpb:.4f}")]


def _legend(searched: Searched, width: int, high: float) -> list[Mark]:
    """Say what the signs mean, only those that are there."""
    parts = [("one", "— best so far")]
    if searched.start.bpb is not None and searched.start.bpb <= high:
        parts.append(("base", "- - start"))
    if searched.failed:
        parts.append(("worse", "× failed"))
    if any(t.bpb is not None and t.bpb > high for t in searched.trials[1:]):
        parts.append(("noise", "^ higher"))
    made, x = [], float(width - 18)
    for colour, words in reversed(parts):
        made.append(Mark("words", colour, ((x, 14),), 12, words, "end"))
        x -= len(words) * 12 * 0.56 + 14
    return made


def _begin(searched: Searched) -> str:
    start = searched.start.bpb
    return "start without a figure" if start is None else f"start: {start:.4f}"


def _scale(searched: Searched) -> tuple[float, float]:
    """Return the lowest and the highest figure that is shown as such."""
    figures = [t.bpb for t in searched.trials if t.bpb is not None]
    low, middle = min(figures), median(figures)
    high = min(max(figures), low + REACH * (middle - low)) if middle > low else max(figures)
    room = (high - low) * 0.06 or 0.005
    return low - 2 * room, high + room


def _height(box: Box, low: float, high: float, bpb: float) -> float:
    return box.bottom - (bpb - low) / (high - low) * (box.bottom - box.top)


def _levels(box: Box, low: float, high: float) -> list[Mark]:
    marks, places = [], ticks(low, high, 5)
    for value in places:
        y = _height(box, low, high, value)
        marks.append(Mark("line", "grid", ((box.left, y), (box.right, y))))
        words = label(value, places[1] - places[0] if len(places) > 1 else 0.01)
        marks.append(Mark("words", "muted", ((box.left - 7, y + 4),), 11, words, "end"))
    return marks
