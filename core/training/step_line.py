"""The moving line of a training run on a terminal: after every step, how far it is, how fast, and how long it takes."""

import math
import time
from collections import deque
from collections.abc import Callable

from core.config import MOST_STEPS, TrainConfig
from core.console import duration
from core.engine.memory import gigabytes
from core.engine.protocol import Pending

Show = Callable[[str], None]
AHEAD = 2
"""Steps that may be under way on the device: the loss of an earlier one is there, and reading it waits for nothing."""
EVERY = 0.25
"""Seconds between two lines: more cannot be read, and a loss that comes from a GPU costs a moment."""
RECENT = 16
"""Steps whose pace is shown."""


class StepLine:
    """Shows where training stands, a line in place of the last one; without `show` it does nothing."""

    def __init__(
        self,
        settings: TrainConfig,
        seconds: Callable[[], float],
        step: int,
        tokens: int,
        show: Show | None,
        stats: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Begin at `step`, behind `tokens` tokens; `seconds` tells the training time so far, `stats` is an engine's."""
        self._settings, self._seconds, self._show, self._stats = settings, seconds, show, stats
        self._pending: deque[Pending] = deque(maxlen=AHEAD + 1)
        self._marks = deque([(step, tokens, seconds())], maxlen=RECENT + 1)
        self._shown = -math.inf
        if show is not None:
            show(f"{of_steps(step + 1, settings)}: under way")

    def __call__(self, step: int, tokens: int, pending: Pending) -> None:
        """Show that `step` steps of `tokens` tokens were started, the last of which is `pending`."""
        if self._show is None:
            return
        self._pending.append(pending)
        self._marks.append((step, tokens, self._seconds()))
        now = time.monotonic()
        if now - self._shown < EVERY:
            return
        self._shown = now
        (before, read, began), (_, _, seconds) = self._marks[0], self._marks[-1]
        took = max(seconds - began, 1e-9)
        left = (self._settings.steps - step) * took / (step - before)
        if self._settings.train_stop is not None:
            left = min(left, self._settings.train_stop - seconds)
        loss = f"loss {self._pending[0].result().loss:.4f}, " if len(self._pending) > AHEAD else ""
        speed = f"{(tokens - read) / took:,.0f} tok/s"
        self._show(f"{of_steps(step, self._settings)}: {loss}{speed}, {self._memory()}{duration(left)} left")

    def _memory(self) -> str:
        """Return what the engine tells of memory: the most that arrays took, or that the process did."""
        stats = self._stats()
        size, what = stats.get("peak_bytes"), "arrays"
        if size is None:
            size, what = stats.get("process_bytes"), "process"
        return "" if size is None else f"{gigabytes(size)} at most ({what}), "


def of_steps(step: int, settings: TrainConfig) -> str:
    """Return how far a run is; one that only the clock ends has no number of steps."""
    return f"step {step}" if settings.steps == MOST_STEPS else f"step {step}/{settings.steps}"
