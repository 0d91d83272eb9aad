"""One line about a run, or about all runs of an ablation, out of the ends of their records.

A list of hundreds of runs cannot afford whole metrics files and checkpoints: the last lines of the one and the header
of the other say how far a run is and what it came to.
"""

import dataclasses
import functools
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core.ablation.records import StoreError, read_failure, read_member_rows
from core.config import ConfigError, RunConfig, from_json
from core.console import one_line
from core.files import FileError
from core.model.params import count
from core.training.checkpoint import saved_step
from core.training.records import RunError, read_environment, read_last_rows, read_object
from core.training.run import Run
from core.training.writer import is_held

RunState = Literal["finished", "running", "resumable", "begun", "imported", "failed", "damaged"]
"""resumable: it has a checkpoint to go on from; begun: it has none yet; failed: of an ablation, which tried it."""
MOST_SEED = 2**63


@dataclass(frozen=True)
class RunRow:
    """What a list says of a run, or of an ablation by its best run; None for what a run has not come to or not told."""

    path: str
    kind: Literal["run", "ablation"]
    state: RunState
    changed: float = 0.0
    """When it recorded something last, as time.time."""
    problem: str | None = None
    """What is wrong with it, in one line, if it is damaged or has failed."""
    runs: int = 1
    done: int = 0
    """How many of its runs are finished."""
    variant: str | None = None
    """Of an ablation's run: the ablation and the variant; of an ablation the one of its best run."""
    preset: str | None = None
    seed: int | None = None
    """Of a run; an ablation has several."""
    backend: str | None = None
    parameters: int | None = None
    step: int | None = None
    """Steps done; of a resumable run those of its checkpoint."""
    steps: int | None = None
    bpb: float | None = None
    """Bits per byte of the artifact."""
    error: float | None = None
    """Standard error of an estimate."""
    label: str | None = None
    """`score` or `estimate`."""
    byte_rule: str | None = None
    windows: str | None = None
    documents: int | None = None
    targets: int | None = None
    data: str | None = None
    """Hash of what it was trained and scored on."""
    bytes: int | None = None
    """Of the artifact."""
    code_bytes: int | None = None
    """That the run reserves for code."""
    budget: int | None = None
    tokens_per_second: float | None = None
    """Over all of the training time."""
    seconds: float | None = None
    """Training time."""

    @property
    def total(self) -> int | None:
        """Bytes that count against the budget: the artifact and the code."""
        return None if self.bytes is None or self.code_bytes is None else self.bytes + self.code_bytes

    @property
    def within(self) -> bool | None:
        """Whether that is within the budget."""
        return None if self.total is None or self.budget is None else self.total <= self.budget

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "total": self.total, "within": self.within}


def run_row(path: Path, home: Path | None = None) -> RunRow:
    """Return the row of a run folder, whatever lies there; `home`: the folder that a store keeps it in."""
    try:
        return _run_row(path, home)
    except (RunError, FileError, OSError) as error:
        return RunRow(str(path), "run", "damaged", _changed(path), one_line(error))


def ablation_row(folder: Path) -> RunRow:
    """Return the row of STORE/ablations/NAME: the best of its finished runs, and how many of them there are."""
    try:
        _, members = read_member_rows(folder / "members.json")
    except StoreError as error:
        return RunRow(str(folder), "ablation", "damaged", _changed(folder), one_line(error))
    runs = folder.parent.parent / "runs"
    return _of_members(folder, [member_row(runs / member.key, member.variant) for member in members])


def member_row(home: Path, variant: str | None = None) -> RunRow:
    """Return the row of a run that a store keeps in STORE/runs/KEY, also of one that nobody has begun."""
    path = home / "run"
    if os.path.lexists(path / "config.json"):
        return dataclasses.replace(run_row(path, home), variant=variant)
    try:
        failed = (home / "failed.json").exists()
        state: RunState = "running" if is_held(home) else "failed" if failed else "begun"
        return RunRow(str(path), "run", state, problem=read_failure(home) if state == "failed" else None)
    except (FileError, OSError) as error:
        return RunRow(str(path), "run", "damaged", problem=one_line(error))


def _of_members(folder: Path, rows: list[RunRow]) -> RunRow:
    done = [row for row in rows if row.state == "finished"]
    scored = [row for row in done if row.bpb is not None]
    lost = next((row for state in ("damaged", "failed") for row in rows if row.state == state), None)
    state: RunState = "resumable"
    if any(row.state == "running" for row in rows):
        state = "running"
    elif lost is not None:
        state = "failed"
    elif len(done) == len(rows):
        state = "finished"
    best = min(scored, key=lambda row: row.bpb or 0.0, default=RunRow("", "run", state))
    return dataclasses.replace(
        best,
        path=str(folder), kind="ablation", state=state, seed=None, runs=len(rows), done=len(done),
        problem=lost and f"{Path(lost.path).parent.name}: {lost.problem}",
        changed=max([_changed(folder), *(row.changed for row in rows)]),
    )  # fmt: skip


def _run_row(path: Path, home: Path | None) -> RunRow:
    config, parameters, seed = _settings(path / "config.json")
    run, env = Run(path, config), read_environment(path / "env.json")
    said: dict[str, Any] = {}
    for line in read_last_rows(run.metrics_path):
        said |= line
    stored, seconds = said.get("final/artifact", {}), said.get("clock/seconds")
    score, data = stored.get("score", {}), env.get("data", {}).get("sha256")
    state, problem, step = _state(run, home, stored, env)
    return RunRow(
        path=str(path), kind="run", state=state, problem=problem, changed=_changed(path),
        done=int(state == "finished"), preset=config.preset, seed=seed, backend=env.get("backend"),
        parameters=parameters, step=said.get("step", 0) if step is None else step, steps=config.train.steps,
        **{name: score.get(name) for name in ("bpb", "error", "label", "byte_rule", "windows", "documents", "targets")},
        data=None if data is None else str(data), bytes=stored.get("bytes"), code_bytes=config.export.code_bytes,
        budget=config.export.budget, seconds=seconds,
        tokens_per_second=run.tokens(said) / seconds if seconds else None,
    )  # fmt: skip


def _state(
    run: Run, home: Path | None, stored: dict[str, Any], env: dict[str, Any]
) -> tuple[RunState, str | None, int | None]:
    """Return where a run stands, why it failed, and the step of the checkpoint that it would go on from."""
    if is_held(run.path) or (home is not None and is_held(home)):
        return "running", None, None
    if stored:
        return "finished", None, None
    if home is not None and (home / "failed.json").exists():
        return "failed", read_failure(home), None
    if not run.checkpoint_path.exists():
        return "begun", None, 0
    return "imported" if "imported" in env else "resumable", None, saved_step(run.checkpoint_path)


def _settings(path: Path) -> tuple[RunConfig, int, int]:
    """Return the settings of a config.json, the number of parameters and the seed; RunError.

    Runs of one setting differ in their seeds, and to check settings takes longer than to read all other records.
    """
    value = read_object(path)
    seed = value.get("seed")
    if type(seed) is not int or abs(seed) >= MOST_SEED:
        raise RunError(f"{path}: seed: expected a whole number; the run's settings are damaged")
    try:
        return *_checked(json.dumps({**value, "seed": 0}, sort_keys=True)), seed
    except ConfigError as error:
        raise RunError(f"{path.parent}/{error}; the run's settings are damaged") from error


@functools.lru_cache(maxsize=256)
def _checked(text: str) -> tuple[RunConfig, int]:
    config = from_json(RunConfig, json.loads(text), "config.json")
    return config, count(config.model)


def _changed(folder: Path) -> float:
    """Return when a folder's records changed last; 0 where that cannot be known."""
    for name in ("metrics.jsonl", "config.json", "members.json", ""):
        with suppress(OSError):
            return os.lstat(folder / name).st_mtime
    return 0.0
