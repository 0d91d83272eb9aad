"""`skc compare RUN RUN ...`: what differs between runs, in settings, machine, curves, score, bytes and speed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.compare.pair import By, RunPair, choose_axis, compare_pair, words
from core.compare.picture import draw
from core.config import differences
from core.files import replace_text
from core.model.params import count
from core.training.run import Run, RunError


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run; None for what it has not reached yet."""

    run: str
    preset: str
    seed: int
    backend: str
    parameters: int
    steps: int
    train_bpb: float | None
    """Bits per byte of the training text at the last line."""
    bpb: float | None
    once: bool | None
    """Whether the artifact has the same bits, and so the same score; None: not known (an older run)."""
    label: str | None
    """`score` or `estimate`."""
    error: float | None
    byte_rule: str | None
    targets: int | None
    artifact_bytes: int | None
    tokens_per_second: float | None
    """Over all of the training time."""
    seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """What differs between runs; every list is in the order of the runs, and the others are compared with the first."""

    rows: tuple[RunFigures, ...]
    settings: dict[str, list[str]]
    """Run -> the fields in which it differs from the first."""
    doubts: tuple[str, ...]
    """Why final figures may not be compared."""
    pairs: dict[str, RunPair]
    """Run -> what differs from the first."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        rows, pairs = [asdict(row) for row in self.rows], {run: pair.to_json() for run, pair in self.pairs.items()}
        return {"rows": rows, "settings": self.settings, "doubts": list(self.doubts), "pairs": pairs}


def compare(paths: list[str], by: By = "auto") -> tuple[Comparison, list[Run]]:
    """Read two or more run folders; RunError if there are fewer, one is named twice, or one cannot be read.

    Curves are aligned by step, tokens or share of the schedule; `auto`: by step if steps are alike, else by tokens.
    """
    runs = [Run.open(path) for path in paths]
    if len(runs) < 2:
        raise RunError(f"expected two or more runs, got {len(runs)}: skc compare RUN RUN")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise RunError(f"a run is named twice in {', '.join(paths)}; name each once")
    rows = tuple(_row(run) for run in runs)
    axis = choose_axis([run.config for run in runs], by)
    settings = {str(run.path): differences(runs[0].config, run.config) for run in runs[1:]}
    pairs = {str(run.path): compare_pair(runs[0], run, axis) for run in runs[1:]}
    return Comparison(rows, settings, tuple(_doubts(runs, rows)), pairs), runs


def _row(run: Run) -> RunFigures:
    env, final, stored = run.environment(), run.last("final/score") or {}, run.last("final/artifact") or {}
    lines = [row for row in run.metrics() if "train/loss" in row]
    steps = lines[-1]["step"] if lines else 0
    seconds = lines[-1]["clock/seconds"] if lines else None
    return RunFigures(
        run=str(run.path),
        preset=run.config.preset,
        seed=run.config.seed,
        backend=str(env.get("backend", "?")),
        parameters=count(run.config.model),
        steps=steps,
        train_bpb=lines[-1].get("train/bpb") if lines else None,
        bpb=final.get("bpb"),
        once=stored.get("once"),
        label=final.get("label"),
        error=final.get("error"),
        byte_rule=final.get("byte_rule"),
        targets=final.get("targets"),
        artifact_bytes=stored.get("bytes"),
        tokens_per_second=run.tokens(lines[-1]) / seconds if seconds else None,
        seconds=seconds,
    )


def _doubts(runs: list[Run], rows: tuple[RunFigures, ...]) -> list[str]:
    doubts = []
    kinds = {"byte_rule": "byte rules", "targets": "numbers of scored tokens", "label": "kinds of figure"}
    for name, what in kinds.items():
        values = sorted({str(getattr(row, name)) for row in rows if row.bpb is not None})
        if len(values) > 1:
            doubts.append(f"different {what}: {', '.join(values)}")
    if len({str(run.environment().get("data")) for run in runs}) > 1:
        doubts.append("different data")
    unfinished = [row.run for row in rows if row.bpb is None]
    if unfinished:
        doubts.append(f"not finished: {', '.join(unfinished)}")
    return doubts


def comparison_table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Return the table of the runs' figures as (head, rows)."""
    head = ("run", "backend", "seed", "parameters", "steps", "bits per byte", "against the first", "bytes", "tokens/s")
    first, rows = comparison.rows[0], []
    for row in comparison.rows:
        spread = f" ± {row.error:.4f}" if row.error else ""
        figure = "-" if row.bpb is None else f"{row.bpb:.4f}{spread} ({row.label})"
        change = "" if row is first or row.bpb is None or first.bpb is None else f"{row.bpb - first.bpb:+.4f}"
        size = "-" if row.artifact_bytes is None else f"{row.artifact_bytes:,}"
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        rows.append((row.run, row.backend, row.seed, row.parameters, row.steps, figure, change, size, speed))
    return head, rows


def lines(comparison: Comparison) -> list[str]:
    """Return what the table does not say: what differs from the first run, and doubts."""
    out = []
    for run, pair in comparison.pairs.items():
        out += [f"{run} against {comparison.rows[0].run}:", *(f"  {line}" for line in words(pair))]
    return out + [f"careful: {doubt}" for doubt in comparison.doubts]


def write_comparison(comparison: Comparison, runs: list[Run], folder: Path) -> list[Path]:
    """Write compare.md and compare.png into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    report, picture = folder / "compare.md", folder / "compare.png"
    draw(runs, list(comparison.pairs.values()), picture)
    head, rows = comparison_table(comparison)
    text = ["# Comparison", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    text += [f"| {' | '.join(f'{c:,}' if isinstance(c, int) else str(c) for c in row)} |" for row in rows]
    text += ["", "![curves above, differences from the first below](compare.png)", "", *_bullets(lines(comparison)), ""]
    replace_text(report, "\n".join(text))
    return [report, picture]


def _bullets(text: list[str]) -> list[str]:
    """Return lines as a list of two levels."""
    return [f"  * {line.strip()}" if line.startswith("  ") else f"* {line}" for line in text]
