"""One factor for all steps, so that the artifact fills the budget: the search alone, over a function. Budget: 2 s."""

import math
from collections.abc import Callable

import pytest

from core.export.fit import COARSEST, FINEST, FitError, fit_factor

ROOM, SLACK = 15_841_188, 32_000


def by_law(weights: float, width: float = 3.3, other: int = 200_000) -> Callable[[float], int]:
    """Return the bytes of weights whose codes take `width` bits at factor 1, less by the factor's logarithm."""
    return lambda factor: round(weights / 8 * max(width - math.log2(factor), 0.0)) + other


def rough(factor: float) -> int:
    """Return bytes that fall in jumps and by another law, and waver where factors are close."""
    return 30_000_000 - 18_000_000 * round(64 * math.sqrt(factor)) // 128 + round(40 * math.sin(1e5 * factor))


@pytest.mark.parametrize("size", [by_law(3.6e7, 2.9), by_law(3.6e7, 4.4), by_law(3.1e7, 5.1), by_law(7e7, 1.6)])
def test_the_artifact_ends_below_the_budget_by_little(size: Callable[[float], int]) -> None:
    asked: list[float] = []

    def counted(factor: float) -> int:
        asked.append(factor)
        return size(factor)

    fit = fit_factor(counted, ROOM, SLACK)
    assert ROOM - SLACK <= fit.size <= ROOM and fit.size == size(fit.factor) and FINEST < fit.factor < COARSEST
    assert fit.trials == len(asked) <= 8, "a trial is minutes of GPTQ"
    assert "fitted in" in fit.words(ROOM) and f"{fit.size:,} of 15,841,188 bytes" in fit.words(ROOM)
    assert "finest" not in fit.words(ROOM)


def test_bytes_that_jump_are_never_above(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in range(12_100_000, 23_000_000, 618_034):
        fit = fit_factor(rough, room, SLACK)
        assert fit.size == rough(fit.factor) <= room and fit.trials < 40
        near = [rough(fit.factor * (1 - share)) for share in (0.002, 0.01)]
        assert room - fit.size <= SLACK or max(near) > room, "finer would be over"


def test_the_finest_step_ends_the_search() -> None:
    small = by_law(1e6)
    fit = fit_factor(small, ROOM, SLACK)
    assert fit == (FINEST, small(FINEST), 1)
    assert fit.words(ROOM).endswith("that is the finest step, so it stops here")


def test_what_no_step_makes_fit_is_refused() -> None:
    with pytest.raises(FitError, match=r"^even steps x 4 give [\d,]+ bytes, [\d,]+ more than there is room for: make"):
        fit_factor(by_law(9e7, 4.0), ROOM, SLACK)
