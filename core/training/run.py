"""The run folder: config.json, env.json, metrics.jsonl (the source of every view), log.txt, state/ and results.

A kill at any moment loses at most the steps since the last checkpoint.
"""

import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TextIO

from core.config import ConfigError, RunConfig, chosen, differences, flattened, from_json, to_json
from core.engine.protocol import Arrays, Engine
from core.files import (
    MAX_TEXT,
    FileError,
    append_file,
    edit_file,
    new_file,
    open_file,
    own_folder,
    read_file,
    read_text,
    replace_file,
    sync_file,
    sync_folder,
)
from core.training.checkpoint import Checkpoint as Checkpoint
from core.training.checkpoint import WeightSource, read_checkpoint, share_checkpoint, write_checkpoint, write_weights
from core.training.moments import read_moments, write_moments
from core.training.records import METRICS, of_a_run, read_environment, read_object, read_rows
from core.training.records import RunError as RunError
from core.training.trackers import Copies
from core.training.writer import refuse_strangers

FREE = (
    "preset", "train.log_every", "train.eval_every", "train.sample_every", "train.save_every",
    "train.save_minutes", "train.keep_every", "eval.", "export.",
)  # fmt: skip
"""Fields that may change when a run is resumed: they do not decide its weights."""
JUDGED = ("eval.", "export.")
"""Fields of those that decide what a finished run says of itself."""
NAMES = (
    "config.json", "env.json", "metrics.jsonl", "log.txt", "tokenizer.model", "artifact.skc", "report.md", "curve.png",
    "lock", *(f"state/{name}" for name in ("checkpoint.safetensors", "score.ledger", "artifact.ledger")),
    "state/plugins.ledger", "state/plugins.ledger.plugins", "state/moments.safetensors",
)  # fmt: skip
"""Files that training writes: better that none is a folder at its start than at its end."""
MAX_TOKENIZER = 64 << 20
BLOCK = 1 << 16
"""Bytes that are looked through at a time for the end of the last whole line."""


class Run:
    """One run folder that exists on disk."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.checkpoint_path = path / "state" / "checkpoint.safetensors"
        self.artifact_path = path / "artifact.skc"
        self.tokenizer_path = path / "tokenizer.model"
        self.metrics_path = path / "metrics.jsonl"
        self.env_path = path / "env.json"
        self.log_path = path / "log.txt"
        self._read: tuple[tuple[int, int, int], list[dict[str, Any]]] | None = None
        """What metrics.jsonl held when it was last read, and as which file: a long one takes seconds."""
        self.copies: Copies | None = None
        """Trackers that get every line of metrics.jsonl too."""

    @property
    def frozen_path(self) -> Path | None:
        """The file whose weights a twin is made of: the artifact; of an import, which may be too large for one, the
        checkpoint; None: there is none yet.
        """
        if self.artifact_path.exists():
            return self.artifact_path
        return self.checkpoint_path if "imported" in self.environment() else None

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open an existing run; RunError says what is there instead."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file, expected a run folder; choose another folder")
        if not (path / "config.json").exists():
            what = "is not a run (it has no config.json)" if path.exists() else "does not exist"
            raise RunError(f"{path}: {what}; make a run with: skc train tiny --out {path}")
        return cls(path, _config(path / "config.json"))

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, tokenizer: bytes, data: Any = None) -> "Run":
        """Make the folder of a new run, or open the one that is there if it is the same run, to go on with it.

        RunError if something else is in the way (nothing is deleted) or a record of the run there is damaged,
        ConfigError if the run there has settings that would give other weights, or other data (`data` says which, as
        in env.json): the message lists them. Whoever calls this holds the folder.
        """
        path = Path(path)
        refuse_strangers(path)
        with of_a_run():
            if (path / "config.json").exists():
                run = cls.open(path)
                _refuse_differences(run, config, tokenizer, data)
                run.check()
                if any(line.startswith(JUDGED) for line in differences(run.config, config)):
                    run.forget()
            run = cls(path, config)
            path.mkdir(parents=True, exist_ok=True)
            own_folder(path / "state")
            run._write_json(path / "config.json", to_json(config))
            replace_file(run.tokenizer_path, tokenizer)
        return run

    def check(self) -> None:
        """Raise RunError for a damaged record, or a folder where a file is written: better now than after the work."""
        self.metrics()
        self.environment()
        for name in NAMES:
            if (self.path / name).is_dir() and not (self.path / name).is_symlink():
                raise RunError(f"{self.path / name}: is a folder, expected a file of the run; move it away")

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        replace_file(path, (json.dumps(value, indent=2) + "\n").encode())

    def record_environment(self, env: dict[str, Any]) -> None:
        """Write env.json: `env` is this start of the run, what it held before goes to its list `earlier`."""
        before = self.environment()
        earlier = [*before.pop("earlier", []), before] if before else []
        self._write_json(self.env_path, {**env, "earlier": earlier})

    def environment(self) -> dict[str, Any]:
        """Return env.json, or nothing where the run has none."""
        return read_environment(self.env_path)

    def tokenizer(self) -> bytes:
        """Return the tokenizer model; RunError, OSError."""
        with of_a_run():
            return read_file(self.tokenizer_path, MAX_TOKENIZER)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl: `step` steps are done and `values` (names of METRICS) were measured."""
        assert values.keys() <= METRICS.keys(), values.keys() - METRICS.keys()
        line = json.dumps({"step": step, **values}, allow_nan=False)
        with of_a_run():
            if self.metrics_path.exists():
                _drop_cut_line(self.metrics_path)
            with append_file(self.metrics_path) as file:
                file.write(f"{line}\n".encode())
        if self.copies is not None:
            self.copies.row(step, values)

    def open_log(self) -> TextIO:
        """Open log.txt for more lines."""
        with of_a_run():
            return io.TextIOWrapper(append_file(self.log_path), encoding="utf-8", errors="backslashreplace")

    def logged_configs(self) -> set[str]:
        """Return the `config_digest` of every start of the run, out of log.txt.

        Before schema 3 a log had a digest of another kind, "configuration sha256", which is left alone.
        """
        if not self.log_path.exists():
            return set()
        with of_a_run():
            return set(re.findall("settings sha256 ([0-9a-f]{64})", read_text(self.log_path)))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; one that a kill cut short is left out; RunError names a bad one."""
        if not self.metrics_path.exists():
            return []
        status = self.metrics_path.stat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        if self._read is None or self._read[0] != stamp:
            self._read = stamp, read_rows(self.metrics_path)
        return list(self._read[1])

    def last(self, name: str) -> Any:
        """Return the newest value of a metric, or None."""
        return next((row[name] for row in reversed(self.metrics()) if name in row), None)

    def tokens(self, row: dict[str, Any]) -> int:
        """Return the tokens of the steps up to a line of metrics.jsonl that has a loss or an estimate."""
        return row.get("tokens", row["step"] * self.config.train.tokens_per_step)

    def forget(self) -> None:
        """Drop what metrics.jsonl says of the finished run: it is to be scored anew."""
        rows = [row for row in self.metrics() if not any(name.startswith("final/") for name in row)]
        self._write_rows(rows)

    def finished(self) -> dict[str, Any] | None:
        """Return what metrics.jsonl says of the end that the run came to, and its files.

        None before that, and where the artifact, the report or the checkpoint is not that of the end; RunError where a
        record is damaged.
        """
        end: dict[str, Any] = {}
        for row in self.metrics():
            end |= {**row, "final": row["step"]} if "final/artifact" in row else row
        names = ["final/score", "final/artifact", *(["final/plugins"] if self.config.eval.learns else [])]
        files = [self.artifact_path, self.path / "report.md", self.path / "curve.png"]
        if not all(name in end for name in names) or not all(file.is_file() for file in files):
            return None
        saved = self.checkpoint()
        same = self.artifact_path.stat().st_size == end["final/artifact"]["bytes"]
        if saved is None or saved.step != end["final"] or not same:
            return None
        backend = self.environment().get("backend", "unknown")
        return {**end, "backend": backend, "files": [str(file) for file in files]}

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        replace_file(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def save(self, engine: Engine, step: int, seconds: float, tokens: int | None = None) -> None:
        """Write the checkpoint of `step` in place of the last one; OSError (a full disk) leaves that one as it was.

        Every `train.keep_every`-th one is also copied to a name of its own, under which it stays.
        """
        with of_a_run():
            if self.metrics_path.exists():
                sync_file(self.metrics_path)  # before the checkpoint: it must not be ahead of what is recorded
            own_folder(self.checkpoint_path.parent)
            write_checkpoint(self.checkpoint_path, engine, step, seconds, tokens)
            self._keep(step)
            sync_folder(self.checkpoint_path.parent)

    def import_weights(self, weights: WeightSource) -> None:
        """Write weights that lie elsewhere as the checkpoint of step 0; OSError."""
        with of_a_run():
            own_folder(self.checkpoint_path.parent)
            write_weights(self.checkpoint_path, weights)
            sync_folder(self.checkpoint_path.parent)

    def _keep(self, step: int) -> None:
        """Copy the last checkpoint, which is that of `step`, to a name of its own if the run keeps it."""
        train, copy_path = self.config.train, self.kept_path(step)
        if train.keep_every and train.save_every and step % (train.save_every * train.keep_every) == 0:
            with new_file(copy_path) as copy, open_file(self.checkpoint_path) as last:
                shutil.copyfileobj(last, copy, 1 << 20)

    def kept_path(self, step: int) -> Path:
        """Return where the checkpoint of `step` is kept, if it is."""
        return self.checkpoint_path.with_name(f"step-{step}.safetensors")

    def kept(self) -> list[int]:
        """Return the steps whose checkpoints are kept beside the last one."""
        names = (path.stem[5:] for path in self.checkpoint_path.parent.glob("step-*.safetensors"))
        return sorted(int(name) for name in names if name.isdecimal())

    def checkpoint(self, step: int | None = None) -> Checkpoint | None:
        """Return the last checkpoint, or None if there is none yet; with `step`, the one that was kept of that step.

        RunError names the file and the field that is wrong, or the steps that there are.
        """
        path = self.checkpoint_path if step is None else self.kept_path(step)
        if not path.exists():
            if step is None:
                return None
            saved = self.checkpoint()
            if saved is not None and saved.step == step:
                return saved
            steps = [*self.kept(), *([saved.step] if saved and saved.step not in self.kept() else [])]
            there = ", ".join(map(str, steps)) or "none yet"
            raise RunError(f"{self.path}: has no checkpoint of step {step}; it has {there}")
        checkpoint = self.read(path)
        if step not in (None, checkpoint.step):
            raise RunError(f"{path}: holds step {checkpoint.step}, not {step}: it was renamed; delete it")
        return checkpoint

    def read(self, path: Path) -> Checkpoint:
        """Return a checkpoint file of this run; RunError, OSError."""
        return read_checkpoint(path, self.config)

    def keep_moments(self, moments: Arrays, of: str) -> None:
        """Keep second moments of training text for the export; `of`: what they depend on."""
        write_moments(self._moments_path, moments, of)

    def kept_moments(self, of: str) -> Arrays | None:
        """Return the moments of `of`, None if the run keeps none of them; RunError."""
        return read_moments(self._moments_path, self.config.model, of)

    @property
    def _moments_path(self) -> Path:
        return self.path / "state" / "moments.safetensors"

    def ledger_path(self, name: str) -> Path | None:
        """Return where the costs of a scoring are kept, so that one that is killed goes on; None: nowhere."""
        return self.path / "state" / name

    def restore(self, engine: Engine) -> tuple[int, float, int]:
        """Load the checkpoint into `engine` and return (steps done, training seconds, tokens); zeros without one.

        Metrics after the checkpoint's step are dropped, so that nothing is recorded twice. ConfigError if the engine
        computes in another type than the run was trained in.
        """
        saved = self.checkpoint()
        if saved and saved.dtype != engine.dtype:
            raise ConfigError(
                f"{self.path}: was trained in {saved.dtype}, this would go on in {engine.dtype}: "
                f"add --dtype {saved.dtype}, or choose another --out"
            )
        step, seconds, tokens = (saved.step, saved.seconds, saved.tokens) if saved else (0, 0.0, 0)
        share_checkpoint(engine.ranks, saved)
        if saved:
            try:
                engine.load_params(saved.params, saved.quantise)
                engine.load_optimizer(saved.optimizer)
            except ValueError as error:
                raise RunError(f"{self.checkpoint_path}: {error}; delete it to train from the start") from error
            if not self.kept_path(step).exists():  # a kill may have come before it got that name
                self._keep(step)
        rows = [row for row in self.metrics() if row["step"] <= step] if saved else []
        self._write_rows(rows)
        if self.copies is not None:
            self.copies.rows(rows)
        return step, seconds, tokens


def config_digest(config: RunConfig) -> str:
    """Return the sha256 of the settings that are not at their defaults, without the seed, what does not decide the
    weights, and the data's place.
    """
    settings = flattened(chosen(config))
    decisive = {name: value for name, value in settings.items() if not name.startswith(("seed", *FREE, "data."))}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _drop_cut_line(path: Path) -> None:
    """Cut a file back to its last whole line: a kill or a full disk may have left part of one."""
    with edit_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size > MAX_TEXT:
            raise FileError(f"{path}: {size:,} bytes, expected at most {MAX_TEXT:,}: it is not read again")
        end = size
        while end:
            begin = max(0, end - BLOCK)
            file.seek(begin)
            place = file.read(end - begin).rfind(b"\n")
            if place >= 0:
                end = begin + place + 1
                break
            end = begin
        if end != size:
            file.truncate(end)


def _refuse_differences(run: Run, config: RunConfig, tokenizer: bytes, data: Any) -> None:
    """Raise ConfigError if the run was begun on other data, or has a checkpoint made with other settings."""
    if run.tokenizer_path.exists() and run.tokenizer() != tokenizer:
        raise ConfigError(f"{run.path}: its tokenizer.model is not that of data.path={config.data.path}: choose --out")
    begun = run.environment().get("data")
    if None not in (begun, data) and begun != data:
        which = "; ".join(_changes(begun, data))
        raise ConfigError(
            f"{run.path}: data.path={config.data.path} holds other data than when it began ({which}): choose --out"
        )
    free = FREE if None in (begun, data) else (*FREE, "data.path")  # the same text, wherever it is
    lines = [line for line in differences(run.config, config) if not line.startswith(free)]
    if lines and (run.checkpoint_path.exists() or run.kept()):
        raise ConfigError(
            f"{run.path} holds a run with other settings ({'; '.join(lines)}): choose another --out, or repeat them"
        )


def _changes(before: Any, after: dict[str, Any]) -> list[str]:
    before = before if isinstance(before, dict) else {}
    pairs = [(key, before.get(key), after.get(key)) for key in {**before, **after}]
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in pairs if old != new]


def _config(path: Path) -> RunConfig:
    try:
        return from_json(RunConfig, read_object(path), str(path))
    except ConfigError as error:
        raise RunError(
            f"{error}; the run's settings are damaged" if str(path) not in str(error) else str(error)
        ) from error
