"""What is seen while an ablation runs: a table that moves on a terminal, elsewhere a line now and then."""

import time
from typing import Any

from core.ablation.runner import Progress
from core.ablation.store import Place
from core.console import PLAIN_EVERY, Console, duration
from core.run import Run, RunError


class Live:
    """Shows the runs under way, each with its step, bits per byte and time left; `seconds` is the time of one run."""

    def __init__(self, say: Console, parallel: int) -> None:
        self._say, self._parallel = say, parallel
        self._began = self._shown = time.monotonic()
        self._live: Any = None
        self._took: list[float] = []
        self._starts: dict[str, float] = {}

    def started(self, place: Place) -> None:
        """Note when a run began."""
        self._starts[place.key] = time.monotonic()

    def ended(self, place: Place) -> None:
        """Note how long a run took that was trained here."""
        if place.key in self._starts:
            self._took.append(time.monotonic() - self._starts.pop(place.key))

    def __call__(self, progress: Progress) -> None:
        """Show where things stand."""
        now = time.monotonic()
        every = 0.5 if self._say.terminal else PLAIN_EVERY
        if now - self._shown < every:
            return
        self._shown = now
        if self._say.terminal:
            self._draw(progress)
        elif progress.running:
            places = "; ".join(" ".join(map(str, row)) for row in map(self._row, progress.running))
            self._say(f"{self._head(progress)}: {places}")

    def close(self) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _head(self, progress: Progress) -> str:
        left = progress.total - progress.done - progress.failed
        failed = f", {progress.failed} failed" if progress.failed else ""
        text = f"{progress.done} of {progress.total} runs done{failed}"
        if self._took and left:
            text += f", about {duration(left * sum(self._took) / len(self._took) / self._parallel)} left"
        return text

    def _draw(self, progress: Progress) -> None:
        from rich.live import Live as RichLive
        from rich.table import Table

        table = Table("variant", "seed", "backend", "step", "bits per byte", "left", title=self._head(progress))
        for place in progress.running:
            table.add_row(*map(str, self._row(place)))
        if self._live is None:
            from rich.console import Console as Rich

            self._live = RichLive(console=Rich(file=self._say.stream), auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table, refresh=True)

    def _row(self, place: Place) -> tuple[object, ...]:
        """Return what is known of a run under way."""
        job, train = place.job, place.job.config.train
        step, bpb, left = 0, "-", "-"
        try:
            rows = Run.open(place.folder).metrics() if (place.folder / "config.json").exists() else []
        except RunError:  # half written
            rows = []
        trained = [row for row in rows if "train/loss" in row]
        if trained:
            step, seconds = trained[-1]["step"], trained[-1]["clock/seconds"]
            if "train/bpb" in trained[-1]:
                bpb = f"{trained[-1]['train/bpb']:.4f}"
            share = seconds / train.seconds if train.seconds else step / train.steps
            left = duration(seconds * (1 - share) / share) if 0 < share < 1 else "scoring"
        steps = f"{step}" if train.seconds else f"{step}/{train.steps}"
        return job.variant, job.seed, job.backend, steps, bpb, left
