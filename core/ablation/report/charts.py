"""Pictures made of lines, areas, dots and words, written as SVG (light and dark) or as PNG."""

import math
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

from core.files import new_file

COLOURS = {
    "ink": ("#1c2430", "#e6e9ee"), "muted": ("#586274", "#a3adbb"), "grid": ("#dde2ea", "#343c48"),
    "page": ("#ffffff", "#14181f"), "box": ("#f5f7fa", "#1c222b"), "better": ("#0b6bcb", "#6cb6ff"),
    "worse": ("#b3470b", "#ff9a5c"), "noise": ("#66707f", "#98a2b1"), "one": ("#0b6bcb", "#6cb6ff"),
    "two": ("#b3470b", "#ff9a5c"), "three": ("#0f7a54", "#4fd1a1"), "base": ("#586274", "#a3adbb"),
}  # fmt: skip
"""Name -> (on a light page, on a dark page); words in each are readable on both `page` and `box`."""
SIZE = 13
LETTER = 0.62
"""Width of a letter of the fonts used, in its height: a careful guess, since nothing is measured."""
NONE = "–"
Spot = tuple[float, float]


class Mark(NamedTuple):
    """One shape on a picture; places are pixels from the top left."""

    shape: Literal["line", "dashes", "area", "dot", "ring", "words"]
    colour: str
    places: tuple[Spot, ...]
    width: float = 1.0
    """Of a line; the radius of a dot; the height of words."""
    words: str = ""
    anchor: Literal["start", "middle", "end"] = "start"


class Picture(NamedTuple):
    """A drawing and what it shows in one sentence, for those who cannot see it."""

    width: int
    height: int
    marks: tuple[Mark, ...]
    words: str


def css() -> str:
    """Return the colours as CSS variables, for light and dark pages."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def svg(picture: Picture) -> str:
    """Return a picture as an SVG element for a page that has `css()`; every word in it is escaped."""
    body = "".join(_svg(mark) for mark in picture.marks)
    size = f'viewBox="0 0 {picture.width} {picture.height}" width="{picture.width}" height="{picture.height}"'
    return f'<svg {size} role="img" aria-label="{escape(picture.words)}">{body}</svg>'


def _svg(mark: Mark) -> str:
    colour = f"var(--{mark.colour})"
    if mark.shape == "words":
        x, y = mark.places[0]
        where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{mark.anchor}" font-size="{mark.width:g}"'
        return f'<text {where} fill="{colour}">{escape(mark.words)}</text>'
    title = f"<title>{escape(mark.words)}</title>" if mark.words else ""
    if mark.shape in ("dot", "ring"):
        x, y = mark.places[0]
        paint = f'fill="{colour}"' if mark.shape == "dot" else f'fill="var(--page)" stroke="{colour}"'
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{mark.width:g}" {paint}>{title}</circle>'
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.places)
    if mark.shape == "area":
        return f'<polygon points="{places}" fill="{colour}" fill-opacity=".18">{title}</polygon>'
    dash = ' stroke-dasharray="4 3"' if mark.shape == "dashes" else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{mark.width:g}"{dash}/>'


def png(picture: Picture, path: Path) -> None:
    """Write a picture as PNG, on white, three dots for two pixels."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Polygon

    figure = Figure(figsize=(picture.width / 100, picture.height / 100), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.axis("off")
    for order, mark in enumerate(picture.marks):
        colour, line = COLOURS[mark.colour][0], mark.width * 0.72  # a pixel is 0.72 points here
        if mark.shape == "words":
            side = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
            words = mark.words.replace("$", r"\$")
            axes.text(*mark.places[0], words, color=colour, ha=side, va="baseline", fontsize=line * 0.9, zorder=order)
        elif mark.shape in ("dot", "ring"):
            fill = colour if mark.shape == "dot" else "white"
            axes.add_patch(Circle(mark.places[0], mark.width, facecolor=fill, edgecolor=colour, lw=0.7, zorder=order))
        elif mark.shape == "area":
            axes.add_patch(Polygon(mark.places, facecolor=colour, alpha=0.18, zorder=order))
        else:
            style = "--" if mark.shape == "dashes" else "-"
            axes.plot(*zip(*mark.places, strict=True), color=colour, linewidth=line, linestyle=style, zorder=order)
    with new_file(path) as file:
        figure.savefig(file, format="png")


def short(words: str, room: float, size: float = SIZE) -> str:
    """Shorten words to `room` pixels by leaving out the middle, since names often share their start."""
    most = max(3, int(room / (size * LETTER)))
    if len(words) <= most:
        return words
    tail = (most - 1) // 2
    return f"{words[: most - 1 - tail]}…{words[len(words) - tail :]}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round places from low to high, 1, 2 or 5 times a power of ten apart: at most `most`, at least two."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    places: list[float] = []
    for step in (power * 10, power * 5, power * 2, power, power / 2):  # from wide to narrow
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if len(places) >= 2 and last - first + 1 > most:
            break
        places = [i * step for i in range(first, last + 1)]
    return places


def label(value: float, step: float, sign: bool = False) -> str:
    """Return a tick's label with as many digits as the step between ticks needs."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 4
    if abs(value) < step / 2:
        return "0"
    return number(value, digits, sign)


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """Return a number with a true minus sign, or a dash for None."""
    return NONE if value is None else f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")
