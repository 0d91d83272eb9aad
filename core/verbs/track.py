"""Verb `skc track RUN ...`: what finished runs recorded, as TensorBoard or Weights & Biases show it."""

from dataclasses import dataclass

from tyro.conf import Positional

from core.training import trackers
from core.training.run import Run, RunError
from core.training.writer import hold
from core.verbs.common import Context, Outcome


@dataclass(frozen=True)
class Track:
    """Options of `skc track`."""

    runs: Positional[tuple[str, ...]]
    """Run folders that nothing trains now."""
    to: tuple[trackers.Name, ...] = ("tensorboard",)
    """Which trackers get a copy; their files are made in each run's folder."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def track(options: Track, context: Context) -> Outcome:
    """Copy every line of each run; not ok if a tracker gave up."""
    if not options.runs:
        raise RunError("expected one or more runs, got none: skc track RUN --to tensorboard")
    trackers.check(options.to)
    runs = [(Run.open(path), Run.open(path).metrics()) for path in options.runs]  # all, before anything is written
    lost = 0
    for run, rows in runs:
        with hold(run.path):
            copies = trackers.start(options.to, run.path, run.config, context.say)
            copies.rows(rows)
            copies.close()
        lost += len(copies.lost)
    return Outcome(not lost, {"runs": [{"run": str(run.path), "lines": len(rows)} for run, rows in runs]})
