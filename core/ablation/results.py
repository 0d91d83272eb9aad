"""What the runs of an ablation gave, read from their folders: they are the source, everything else is a view."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.ablation.plan import Ablation, Job
from core.run import Run, RunError

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


class Outcome(NamedTuple):
    """An ablation and what its runs gave so far."""

    plan: Ablation
    results: tuple[Result, ...]
    """In the order of `Ablation.jobs`."""

    def of(self, variant: str, backend: str | None = None) -> list[Result]:
        """Return the finished runs of a variant, by seed."""
        found = [r for r in self.results if r.variant == variant and r.status == "done"]
        return sorted((r for r in found if backend in (None, r.backend)), key=lambda r: r.seed)


def read_result(job: Job, folder: Path, status: Status, message: str | None = None) -> Result:
    """Read what a run folder holds of a job; RunError names a file that is damaged."""
    bare = Result(job.variant, job.seed, job.backend, status, folder, message=message)
    if not (folder / "config.json").exists():
        return bare
    try:
        run = Run.open(folder)
        rows = run.metrics()
    except RunError as error:
        if status == "done":
            raise
        return bare._replace(message=message or str(error))
    curve = _curve(rows, run.config.train.tokens_per_step)
    trained = [p for p in curve if p.train_bpb is not None] or list(curve)
    last = trained[-1] if trained else None
    made = bare._replace(curve=curve, steps=last.step if last else 0, seconds=last.seconds if last else 0.0)
    if last and last.seconds:
        made = made._replace(tokens_per_second=last.tokens / last.seconds)
    final: dict[str, Any] | None = next((r["final/artifact"] for r in reversed(rows) if "final/artifact" in r), None)
    if final is None or status != "done":
        return made
    score = final["score"]
    samples = next((r["samples"] for r in reversed(rows) if "samples" in r), [])
    from core.params import count

    return made._replace(
        bpb=score["bpb"], error=score["error"], byte_rule=score["byte_rule"], label=score["label"],
        bytes=final["bytes"], parameters=count(run.config.model), samples=tuple(samples),
    )  # fmt: skip


def _curve(rows: list[dict[str, Any]], tokens_per_step: int) -> tuple[Point, ...]:
    points: dict[int, Point] = {}
    for row in rows:
        step = row["step"]
        before = points.get(step)
        seconds = row.get("clock/seconds", before.seconds if before else None)
        if seconds is None:
            continue
        old = before or Point(step, step * tokens_per_step, seconds, None, None)
        points[step] = old._replace(
            train_bpb=row.get("train/bpb", old.train_bpb), val_bpb=row.get("val/bpb", old.val_bpb)
        )
    return tuple(points[step] for step in sorted(points))
