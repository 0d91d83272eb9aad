"""What ablation tests share: a plan in TOML, the stand-in worker's command, and what the runs left."""

import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from core.ablation.plan import Ablation
from core.ablation.runner import RunnerProgress, run_all
from core.ablation.store import Place, RunStore

WORKER = (sys.executable, "-m", "shared_tests.support.ablation_worker")

DATA = {"name": "test", "sha256": "0"}

PLAN = """
    name = "widths"
    base = "debug"
    seeds = [1, 2, 3, 4]
    backends = ["cuda"]
    [budget]
    steps = 10
    [settings]
    "train.log_every" = 1
    [variants.plain]
    [variants.wide]
    "model.dim" = 64
    """


def write(folder: Path, text: str = PLAN, name: str = "plan.toml") -> Path:
    """Write an ablation file."""
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def places(store: RunStore, plan: Ablation, code: str = "code") -> list[Place]:
    """Return where the runs of a plan are kept."""
    return [store.place(job, code, DATA) for job in plan.jobs()]


def go(store: RunStore, where: list[Place], parallel: int = 2, worker: Sequence[str] = WORKER) -> list[RunnerProgress]:
    """Run the stand-in worker on all places and return what was shown."""
    shown: list[RunnerProgress] = []
    run_all(
        store, where, parallel=parallel, threads=1, worker=worker, shown=shown.append,
        started=lambda place: store.prepare(place, "code", DATA, "test"),
        ended=lambda place: None,
    )  # fmt: skip
    return shown


def taken(where: list[Place]) -> list[Counter[str]]:
    """Return how often each step of each run was taken."""
    return [Counter((place.home / "taken.txt").read_text().split()) for place in where]
