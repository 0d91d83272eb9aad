"""Results of an ablation's runs, read from their folders, which are the only source."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from core.ablation.plan import Ablation, Job
from core.ablation.records import Start, starts
from core.training.run import Run, RunError

Status = Literal["waiting", "running", "done", "failed"]


class Point(NamedTuple):
    """One place of a learning curve."""

    step: int
    tokens: int
    seconds: float
    """Training time."""
    train_bpb: float | None
    val_bpb: float | None
    """Validation estimate, where one was made."""


class Result(NamedTuple):
    """One run of an ablation."""

    variant: str
    seed: int
    backend: str
    status: Status
    folder: Path
    bpb: float | None = None
    """Of the artifact as its reader returns it; None until the run is done."""
    error: float | None = None
    """Standard error, where the figure is an estimate over some documents."""
    byte_rule: str | None = None
    label: str | None = None
    """`score` or `estimate`."""
    bytes: int | None = None
    """Of the artifact."""
    parameters: int | None = None
    steps: int | None = None
    seconds: float | None = None
    """Training time."""
    tokens_per_second: float | None = None
    curve: tuple[Point, ...] = ()
    samples: tuple[str, ...] = ()
    message: str | None = None
    """Of a failed run: what it said last."""
    documents: int | None = None
    """That the score is over; the others are as in core.scoring.score.Score too."""
    total_documents: int | None = None
    targets: int | None = None
    data: str | None = None
    """Which text it was trained and scored on, as JSON."""
    device: str | None = None
    """What trained it; several, in order, if it was started on several."""
    dtype: str | None = None
    """Compute type."""
    host: str | None = None
    """Hash of the machine's name."""
    threads: int | None = None
    """CPU threads that it was given; None: as the libraries chose."""
    beside: float | None = None
    """How many runs of its `skc ablate` ran side by side with it, itself among them, on average over its time."""


class Results(NamedTuple):
    """An ablation and what its runs gave so far."""

    plan: Ablation
    results: tuple[Result, ...]
    """In the order of `Ablation.jobs`."""
    added: tuple[int, ...] = ()
    """Seeds that were added after a report had shown the others."""

    def of(self, variant: str, backend: str | None = None) -> list[Result]:
        """Return the finished runs of a variant, by seed."""
        runs = [r for r in self.results if r.variant == variant and r.status == "done"]
        return sorted((r for r in runs if backend in (None, r.backend)), key=lambda r: r.seed)


def read_result(job: Job, folder: Path, status: Status, message: str | None = None) -> Result:
    """Read what a run folder holds of a job; RunError names a file that is damaged."""
    bare = Result(job.variant, job.seed, job.backend, status, folder, message=message)
    if not (folder / "config.json").exists():
        return bare
    run = Run.open(folder)
    rows = run.metrics()
    env = _environment(run)
    curve = _curve(rows, run)
    trained = [p for p in curve if p.train_bpb is not None] or list(curve)
    last = trained[-1] if trained else None
    result = _where(bare, env, folder)._replace(
        curve=curve, steps=last.step if last else 0, seconds=last.seconds if last else 0.0
    )
    if last and last.seconds:
        result = result._replace(tokens_per_second=last.tokens / last.seconds)
    artifact = final(rows)
    if artifact is None or status != "done":
        return result
    score = artifact["score"]
    samples = next((r["samples"] for r in reversed(rows) if isinstance(r.get("samples"), list)), [])
    from core.model.params import count

    return result._replace(
        bpb=score["bpb"], error=score["error"], byte_rule=score["byte_rule"], label=score["label"],
        documents=score.get("documents"), total_documents=score.get("total_documents"), targets=score.get("targets"),
        bytes=artifact["bytes"], parameters=count(run.config.model), samples=tuple(map(str, samples)),
    )  # fmt: skip


def final(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the line of the artifact's score in a run's metrics; None before the end."""
    return next((row["final/artifact"] for row in reversed(rows) if "final/artifact" in row), None)


def _environment(run: Run) -> dict[str, Any]:
    """Return env.json; nothing where it is damaged: no figure depends on it."""
    try:
        return run.environment()
    except RunError:
        return {}


def _where(result: Result, env: dict[str, Any], folder: Path) -> Result:
    """Add what is known of the machines of a run to its result."""
    earlier = env.get("earlier")
    times = [e for e in [*(earlier if isinstance(earlier, list) else []), env] if isinstance(e, dict)]
    began = starts(folder.parent)
    return result._replace(
        device=_joined([e.get("device") for e in times]),
        dtype=env["dtype"] if isinstance(env.get("dtype"), str) else None,
        data=json.dumps(env["data"], sort_keys=True) if "data" in env else None,
        host=_joined([start.host for start in began]),
        threads=began[-1].threads if began else None,
        beside=_beside(began),
    )


def _joined(names: list[Any]) -> str | None:
    """Return different names in order as one text, None without any."""
    return ", then ".join(dict.fromkeys(str(name) for name in names if name)) or None


def _beside(began: tuple[Start, ...]) -> float | None:
    """Return how many runs ran side by side, on average over all starts; for a killed start, how many were allowed."""
    known = [s.seconds for s in began if s.seconds]
    usual = sum(known) / len(known) if known else 1.0
    parts = [(s.seconds or usual, s.beside if s.beside is not None else s.parallel) for s in began]
    counted = [(seconds, beside) for seconds, beside in parts if beside is not None]
    return fmean([b for _, b in counted], [seconds for seconds, _ in counted]) if counted else None


def _curve(rows: list[dict[str, Any]], run: Run) -> tuple[Point, ...]:
    points: dict[int, Point] = {}
    for row in rows:
        step = row["step"]
        before = points.get(step)
        seconds = row.get("clock/seconds", before.seconds if before else None)
        if seconds is None:
            continue
        old = before or Point(step, run.tokens(row), seconds, None, None)
        points[step] = old._replace(
            train_bpb=row.get("train/bpb", old.train_bpb), val_bpb=row.get("val/bpb", old.val_bpb)
        )
    return tuple(points[step] for step in sorted(points))
