"""`skc compare RUN RUN ...`: what differs between runs, in settings, curves, score, bytes and speed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config import differences
from core.params import count
from core.run import Run, RunError

COLOURS = ("#4c72b0", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd", "#8c8c8c", "#dd8452")


@dataclass(frozen=True)
class Row:
    """One run in figures; None where it has not come that far."""

    run: str
    preset: str
    seed: int
    backend: str
    parameters: int
    steps: int
    train_bpb: float | None
    """Bits per byte of the training text at the last line."""
    bpb: float | None
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
    """What `compare` found; every list is in the order of the runs, the first is what the others are held against."""

    rows: tuple[Row, ...]
    settings: dict[str, list[str]]
    """Run -> the fields in which it differs from the first."""
    gaps: dict[str, float | None]
    """Run -> largest difference of its training loss from the first run's, over the steps that both recorded."""
    doubts: tuple[str, ...]
    """Why final figures may not be held against each other."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "doubts": list(self.doubts)}


def compare(paths: list[str]) -> tuple[Comparison, list[Run]]:
    """Read two or more run folders; RunError if there are fewer, one is named twice, or one cannot be read."""
    if len(paths) < 2:
        raise RunError(f"compare: {len(paths)} run given, expected two or more: skc compare RUN RUN")
    runs = [Run.open(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise RunError(f"compare: a run is named twice in {', '.join(paths)}; name each once")
    rows = tuple(_row(run) for run in runs)
    losses = [{r["step"]: r["train/loss"] for r in run.metrics() if "train/loss" in r} for run in runs]
    settings, gaps = {}, {}
    for run, loss in zip(runs[1:], losses[1:], strict=True):
        settings[str(run.path)] = differences(runs[0].config, run.config)
        common = losses[0].keys() & loss.keys()
        gaps[str(run.path)] = max((abs(losses[0][step] - loss[step]) for step in common), default=None)
    return Comparison(rows, settings, gaps, tuple(_doubts(runs, rows))), runs


def _row(run: Run) -> Row:
    env, final, stored = run.environment(), run.last("final/score") or {}, run.last("final/artifact") or {}
    lines = [row for row in run.metrics() if "train/loss" in row]
    steps = lines[-1]["step"] if lines else 0
    seconds = lines[-1]["clock/seconds"] if lines else None
    return Row(
        run=str(run.path),
        preset=run.config.preset,
        seed=run.config.seed,
        backend=str(env.get("backend", "?")),
        parameters=count(run.config.model),
        steps=steps,
        train_bpb=lines[-1].get("train/bpb") if lines else None,
        bpb=final.get("bpb"),
        label=final.get("label"),
        error=final.get("error"),
        byte_rule=final.get("byte_rule"),
        targets=final.get("targets"),
        artifact_bytes=stored.get("bytes"),
        tokens_per_second=steps * run.config.train.tokens_per_step / seconds if seconds else None,
        seconds=seconds,
    )


def _doubts(runs: list[Run], rows: tuple[Row, ...]) -> list[str]:
    found = []
    kinds = {"byte_rule": "byte rules", "targets": "numbers of scored tokens", "label": "kinds of figure"}
    for name, what in kinds.items():
        values = sorted({str(getattr(row, name)) for row in rows if row.bpb is not None})
        if len(values) > 1:
            found.append(f"different {what}: {', '.join(values)}")
    if len({str(run.environment().get("data")) for run in runs}) > 1:
        found.append("different data")
    unfinished = [row.run for row in rows if row.bpb is None]
    if unfinished:
        found.append(f"not finished: {', '.join(unfinished)}")
    return found


def table(found: Comparison) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Return (head, rows) for people."""
    head = ("run", "backend", "seed", "parameters", "steps", "bits per byte", "against the first", "bytes", "tokens/s")
    first, rows = found.rows[0], []
    for row in found.rows:
        spread = f" ± {row.error:.4f}" if row.error else ""
        figure = "-" if row.bpb is None else f"{row.bpb:.4f}{spread} ({row.label})"
        change = "" if row is first or row.bpb is None or first.bpb is None else f"{row.bpb - first.bpb:+.4f}"
        size = "-" if row.artifact_bytes is None else f"{row.artifact_bytes:,}"
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        rows.append((row.run, row.backend, row.seed, row.parameters, row.steps, figure, change, size, speed))
    return head, rows


def lines(found: Comparison) -> list[str]:
    """Return what the table does not say: differing settings, how far the curves part, doubts."""
    out = []
    for run, changed in found.settings.items():
        gap = found.gaps[run]
        apart = "no common step" if gap is None else f"training losses at most {gap:.2g} nats apart"
        out.append(f"{run} against {found.rows[0].run}: {apart}; {'; '.join(changed) or 'the same settings'}")
    return out + [f"careful: {doubt}" for doubt in found.doubts]


def write_comparison(found: Comparison, runs: list[Run], folder: Path) -> list[Path]:
    """Write compare.md and compare.png into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    report, picture = folder / "compare.md", folder / "compare.png"
    _draw(runs, picture)
    head, rows = table(found)
    text = ["# Comparison", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    text += [f"| {' | '.join(f'{c:,}' if isinstance(c, int) else str(c) for c in row)} |" for row in rows]
    text += ["", "![bits per byte against step](compare.png)", "", *(f"* {line}" for line in lines(found)), ""]
    report.write_text("\n".join(text), encoding="utf-8")
    return [report, picture]


def _draw(runs: list[Run], path: Path) -> None:
    """Draw every run's training curve (thin) and validation estimates (points), one colour a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        colour, rows = COLOURS[i % len(COLOURS)], run.metrics()
        train = [(row["step"], row["train/bpb"]) for row in rows if "train/bpb" in row]
        val = [(row["step"], row["val/bpb"], row.get("val/error", 0.0)) for row in rows if "val/bpb" in row]
        name = run.path.name
        if train:
            axes.plot(*zip(*train, strict=True), color=colour, linewidth=1.0, alpha=0.6, label=f"{name}, training")
        if val:
            steps, values, errors = zip(*val, strict=True)
            style: dict[str, Any] = {"color": colour, "fmt": "o", "markersize": 4, "capsize": 3}
            axes.errorbar(steps, values, yerr=errors, label=f"{name}, validation", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
