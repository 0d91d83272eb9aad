"""A search whose runs are a made-up score."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.ablation.plan import Ablation, Job, read_plan
from core.ablation.search.search import Searched, run_search
from core.ablation.store import Place, RunStore
from core.config import RunConfig
from core.training.run import Run
from shared_tests.support.ablation_runs import DATA
from shared_tests.support.ablation_worker import whole_score

PLAN = """
    name = "rates"
    base = "debug"
    seeds = [1, 2, 3, 4]
    backends = ["cuda"]
    [budget]
    steps = 10
    [settings]
    "train.log_every" = 1
    [variants.plain]
    [search]
    trials = 12
    seeds = [100, 101]
    [search.space]
    "train.lr_matrix" = { low = 1e-4, high = 1.0, log = true }
    "model.dim" = { low = 16, high = 64, step = 16 }
    "train.matrix_rule" = { values = ["adamw", "muon"] }
    """


def smooth(config: RunConfig) -> float | None:
    """Return bits per byte: best at a rate of 0.01, wider is better, diverges above 0.3."""
    if config.train.lr_matrix > 0.3:
        return None
    rate = math.log10(config.train.lr_matrix / 0.01)
    return 2.0 + 0.05 * rate**2 - config.model.dim / 1000 + config.seed / 10_000


class Runs:
    """A store, and runs that are made in it at once and counted."""

    def __init__(self, folder: Path, bpb: Callable[[RunConfig], float | None] = smooth, message: str = "") -> None:
        self.store, self.bpb, self.made = RunStore(folder), bpb, Counter[str]()
        self.message = message or "the loss (nan) is not finite"

    def place(self, job: Job) -> Place:
        """Return where a job is kept."""
        return self.store.place(job, "code", DATA)

    def train(self, places: Sequence[Place]) -> None:
        """Bring runs to their ends, the last one first: what ends first must not matter."""
        for place in reversed(places):
            if self.store.status(place)[0] != "done":
                (place.home / "failed.json").unlink(missing_ok=True)
                self.store.prepare(place, "code", DATA, "test")
                self.make(place)

    def make(self, place: Place) -> None:
        """Make a run, or fail it."""
        self.made[place.key] += 1
        config, bpb = place.job.config, self.bpb(place.job.config)
        run = Run.create(place.folder, config, b"tokenizer")
        if bpb is None:
            return self.store.fail(place, self.message)
        for step in (5, 10):
            run.log(step, {"train/loss": 3.0, "train/bpb": bpb, "clock/seconds": 0.1 * step})
        run.log(10, {"final/artifact": {"score": whole_score(bpb), "bytes": 1000 + config.model.dim}})

    def run_all(self, store: RunStore, places: Sequence[Place], *, started: Any, ended: Any, **_: Any) -> None:
        """Stand in for core.ablation.runner.run_all."""
        for place in places:
            if store.status(place)[0] != "done":
                (place.home / "failed.json").unlink(missing_ok=True)
                started(place)
                self.make(place)
            ended(place)

    def search(self, plan: Ablation, train: Any = True, **options: Any) -> Searched:
        """Search, training where `train`."""
        assert plan.search is not None
        by = self.train if train is True else train or None
        return run_search(plan, plan.search, self.store, self.place, lambda _: None, by, **options)


def read(folder: Path, text: str = PLAN, name: str = "rates.toml") -> Ablation:
    """Write and read an ablation file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(textwrap.dedent(text))
    return read_plan(folder / name)
