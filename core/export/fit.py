"""Steps that fit the budget: one factor for all of them, as fine as the bytes allow."""

import math
from collections.abc import Callable
from typing import NamedTuple

FINEST, COARSEST = 0.5, 4.0
"""Limits of the common factor: finer steps would cut off large weights, coarser ones leave few codes."""
SLACK = 0.002
"""Share of the budget that may be left over."""
CLOSEST = 2.0**-11
"""Relative distance of two factors that float16 scales cannot tell apart."""


class FitError(ValueError):
    """No step between the limits makes the artifact fit."""


class Fit(NamedTuple):
    """The factor that was found, and what it took."""

    factor: float
    size: int
    """Bytes at this factor: never more than there is room for."""
    trials: int

    def words(self, room: int) -> str:
        """Return in words what was found, where the artifact has room for `room` bytes."""
        found = f"fitted in {self.trials} trials: steps x {self.factor:.4f} give {self.size:,} of {room:,} bytes"
        return f"{found}; that is the finest step, so it stops here" if self.factor == FINEST else found


def fit_factor(size: Callable[[float], int], room: int, slack: int) -> Fit:
    """Return the common factor whose `size` is at most `room` and, if factors can do it, more than `room - slack`.

    `size` falls as the factor rises, nearly by equal bytes for equal ratios: so the bracket is cut where that law puts
    the middle of the slack, and every third time in half. FitError if the coarsest step is over `room`.
    """
    fine, most = math.log(FINEST), size(FINEST)
    if most <= room:
        return Fit(FINEST, most, 1)
    coarse, least = math.log(COARSEST), size(COARSEST)
    if least > room:
        raise FitError(
            f"even steps x {COARSEST:g} give {least:,} bytes, {least - room:,} more than there is room for: "
            "make the model smaller, or raise export.budget"
        )
    trials, factor = 2, COARSEST
    while room - least > slack and coarse - fine > CLOSEST:
        share = 0.5 if trials % 3 == 1 else (most - room + slack / 2) / (most - least)
        middle = fine + min(max(share, 0.02), 0.98) * (coarse - fine)
        trials, bytes_there = trials + 1, size(math.exp(middle))
        if bytes_there <= room:
            coarse, least, factor = middle, bytes_there, math.exp(middle)
        else:
            fine, most = middle, bytes_there
    return Fit(factor, least, trials)
