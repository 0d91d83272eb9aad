"""The training loss as a small picture of letters, for a terminal: braille dots, or stars where it lacks them."""

import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MOST_WIDE = 72
HIGH = 6
"""Lines of the picture."""
MARGIN = 9
"""Columns in front of it, for the losses."""
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of every dot of a letter, line by line: U+2800 and these make all 256."""


class Letters(NamedTuple):
    """What a picture is made of: a letter has so many dots."""

    across: int
    down: int
    braille: bool


def letters_for(encoding: str | None) -> Letters:
    """Return what a stream of an encoding can show."""
    try:
        "\u28ff".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return Letters(1, 1, False)
    return Letters(2, 4, True)


class LossPlot:
    """Collects what a run records, as trackers do, and draws the losses so far."""

    def __init__(self, letters: Letters, moving: Callable[..., None]) -> None:
        self._letters, self._moving = letters, moving
        self._losses: dict[int, float] = {}

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl."""
        if "train/loss" in values:
            self._losses[step] = values["train/loss"]

    def close(self) -> None:
        """End, as trackers do: nothing is held back."""

    def show(self, line: str) -> None:
        """Show a line in place of the last one, with the picture below."""
        self._moving(line, self.lines())

    def lines(self) -> list[str]:
        """Return the picture, nothing for fewer than two losses."""
        wide = min(MOST_WIDE, shutil.get_terminal_size().columns - MARGIN - 2)
        if len(self._losses) < 2 or wide < 8:
            return []
        steps = sorted(self._losses)
        return draw(np.array(steps), np.array([self._losses[step] for step in steps]), wide, HIGH, self._letters)


def draw(steps: np.ndarray, losses: np.ndarray, wide: int, high: int, letters: Letters) -> list[str]:
    """Return a curve as `high` lines of `wide` letters behind a margin, and a line with its first and last step.

    Between two losses (steps ascend) it is straight; the largest is at the top, the smallest at the bottom.
    """
    columns, rows = wide * letters.across, high * letters.down
    curve = np.interp(np.linspace(steps[0], steps[-1], columns), steps, losses)
    low, top = float(losses.min()), float(losses.max())
    heights = np.rint((top - curve) / max(top - low, 1e-9) * (rows - 1)).astype(int)
    dots = np.zeros((rows, columns), bool)
    for column, (before, here) in enumerate(zip([heights[0], *heights[:-1]], heights, strict=True)):
        dots[min(before, here) : max(before, here) + 1, column] = True
    lines = []
    for row in range(high):
        label = f"{top:.3f}" if row == 0 else f"{low:.3f}" if row == high - 1 else ""
        cells = dots[row * letters.down : (row + 1) * letters.down].reshape(letters.down, wide, letters.across)
        lines.append(f"{label:>{MARGIN - 1}} " + "".join(_letter(cells[:, i], letters) for i in range(wide)).rstrip())
    first, last = f"step {steps[0]}", f"{steps[-1]}"
    return [*lines, " " * MARGIN + first + last.rjust(wide - len(first))]


def _letter(dots: np.ndarray, letters: Letters) -> str:
    if not dots.any():
        return " "
    return chr(0x2800 + int((dots * np.array(BRAILLE)).sum())) if letters.braille else "*"
