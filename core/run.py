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
from typing import Any, NamedTuple, TextIO

import numpy as np
import safetensors
import safetensors.numpy

from core.config import LATER, ConfigError, RunConfig, differences, from_json, to_json
from core.engine import Arrays, Engine
from core.files import TEMPORARY, naming, new_file, open_file, replace_file, sweep
from core.params import check_arrays, optimizer_slots, param_table
from core.ranks import Ranks, agree, share_arrays
from core.trackers import Copies

METRICS = {
    "train/loss": "mean nats per target since the last line",
    "train/bpb": "estimate of bits per byte from train/loss and the bytes per token of the training text",
    "train/grad_norm": "mean global gradient norm before clipping since the last line",
    "opt/lr": "learning rate of the matrix group",
    "perf/tok_s": "tokens per second of training time since the last line",
    "perf/step_ms": "training time per step since the last line",
    "clock/seconds": "training time since step 0: no evaluation, samples, checkpoints or compilation",
    "clock/stopped": "training time when the last step was done",
    "clock/closed": "the same when the training text was closed; the last checkpoint, written in between, counts",
    "progress": "share of the run that the schedule saw at the last step",
    "progress/each": "the same for every step since the last line (runs with train.seconds only)",
    "val/bpb": "validation estimate made during training",
    "val/error": "its standard error",
    "samples": "texts that the model wrote",
    "final/score": "the Score of the weights in memory",
    "final/artifact": "the Score of the weights reloaded from the artifact, its bytes and the gap",
    "final/plugins": "the Score of the artifact with the plug-ins of eval.plugins",
}
"""Every name that metrics.jsonl may hold beside `step`, the number of steps done."""
FREE = (
    "preset", "train.log_every", "train.eval_every", "train.sample_every", "train.save_every", "train.keep_every",
    "eval.", "export.",
)  # fmt: skip
"""Fields that may change when a run is resumed: they do not decide its weights."""
MAX_TEXT = 64 << 20
SCHEMA = 2


class RunError(ValueError):
    """A run folder cannot be used: the message names the file and what is wrong with it."""


class Checkpoint(NamedTuple):
    """What state/checkpoint.safetensors holds."""

    step: int
    """Steps done."""
    seconds: float
    """Training time so far."""
    params: Arrays
    optimizer: Arrays
    dtype: str
    """Compute type that it was trained in."""
    quantise: bool
    """Whether forward passes use the stored form of the weights."""


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
        self.copies: Copies | None = None
        """Trackers that get every line of metrics.jsonl too."""

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open an existing run; RunError says what is there instead."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file, expected a run folder; choose another folder")
        if not (path / "config.json").is_file():
            what = "is not a run (it has no config.json)" if path.exists() else "does not exist"
            raise RunError(f"{path}: {what}; make a run with: skc train tiny --out {path}")
        return cls(path, _config(path / "config.json"))

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, tokenizer: bytes, data: Any = None) -> "Run":
        """Make the folder of a new run, or open the one that is there if it is the same run, to go on with it.

        RunError if something else is in the way (nothing is deleted), ConfigError if the run there has settings that
        would give other weights, or other data (`data` says which, as in env.json): the message lists them.
        """
        path = Path(path)
        if path.is_dir() and not (path / "config.json").exists() and _strangers(path):
            raise RunError(f"{path}: exists, is not empty and is not a run; choose another --out")
        if (path.exists() and not path.is_dir()) or (path / "config.json").exists():
            run = cls.open(path)
            _refuse_differences(run, config, tokenizer, data)
        run = cls(path, config)
        (path / "state").mkdir(parents=True, exist_ok=True)
        for folder in (path, path / "state"):
            sweep(folder)
        run._write_json(path / "config.json", to_json(config))
        replace_file(run.tokenizer_path, tokenizer)
        return run

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        replace_file(path, (json.dumps(value, indent=2) + "\n").encode())

    def record_environment(self, env: dict[str, Any]) -> None:
        """Write env.json: `env` is this start of the run, what it held before goes to its list `earlier`."""
        before = self.environment()
        earlier = [*before.pop("earlier", []), before] if before else []
        self._write_json(self.env_path, {**env, "earlier": earlier})

    def environment(self) -> dict[str, Any]:
        """Return env.json, or nothing where the run has none."""
        return _read_json(self.env_path) if self.env_path.exists() else {}

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl: `step` steps are done and `values` (names of METRICS) were measured."""
        assert values.keys() <= METRICS.keys(), values.keys() - METRICS.keys()
        line = json.dumps({"step": step, **values}, allow_nan=False)
        if self.metrics_path.exists():
            _drop_cut_line(self.metrics_path)
        with naming(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self.copies is not None:
            self.copies.row(step, values)

    def open_log(self) -> TextIO:
        """Open log.txt for more lines."""
        return io.TextIOWrapper(io.BufferedWriter(_Named(self.log_path, "ab")), encoding="utf-8")

    def logged_configs(self) -> set[str]:
        """Return the `config_digest` of every start of the run, out of log.txt."""
        text = _read_text(self.log_path) if self.log_path.exists() else ""
        return set(re.findall("configuration sha256 ([0-9a-f]{64})", text))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; one that a kill cut short is left out; RunError names a bad one."""
        if not self.metrics_path.exists():
            return []
        *lines, rest = _read_text(self.metrics_path).split("\n")
        rows = []
        for number, line in enumerate(lines, 1):
            row = _parse(f"{self.metrics_path}:{number}", line)
            if type(row.get("step")) is not int:
                raise RunError(f"{self.metrics_path}:{number}: step: expected a whole number, got {row.get('step')!r}")
            rows.append(row)
        return rows

    def last(self, name: str) -> Any:
        """Return the newest value of a metric, or None."""
        return next((row[name] for row in reversed(self.metrics()) if name in row), None)

    def save(self, engine: Engine, step: int, seconds: float) -> None:
        """Write the checkpoint of `step` in place of the last one; OSError (a full disk) leaves that one as it was.

        Every `train.keep_every`-th one also gets a name of its own, under which it stays.
        """
        arrays = {f"param/{name}": value for name, value in engine.params().items()}
        arrays |= {f"optim/{name}": value for name, value in engine.optimizer().items()}
        meta = {"dtype": engine.dtype, "quantise": engine.quantise, "schema": SCHEMA, "seconds": seconds, "step": step}
        state = json.dumps({**meta, "sha256": _digest(arrays)}, separators=(",", ":"), sort_keys=True)
        if self.metrics_path.exists():
            _sync(self.metrics_path)  # before the checkpoint: it must not be ahead of what is recorded
        self.checkpoint_path.parent.mkdir(exist_ok=True)
        replace_file(self.checkpoint_path, safetensors.numpy.save(arrays, {"skc": state}))
        self._keep(step)
        _sync(self.checkpoint_path.parent)

    def _keep(self, step: int) -> None:
        """Give the last checkpoint, which is that of `step`, a name of its own if the run keeps it."""
        train, kept = self.config.train, self.kept_path(step)
        if train.keep_every and train.save_every and step % (train.save_every * train.keep_every) == 0:
            with new_file(kept) as copy, open_file(self.checkpoint_path) as last:
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
        try:
            with safetensors.safe_open(path, "numpy") as file:
                state = _parse(f"{path}: skc", (file.metadata() or {}).get("skc", ""))
                arrays = {key: _tensor(path, file, key) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise RunError(f"{path}: damaged checkpoint ({error}); delete it to train from the start") from error
        found, seconds = state.get("step"), state.get("seconds", -1.0)
        if state.get("schema") != SCHEMA or type(found) is not int or not 0 <= found < 2**53:
            raise RunError(
                f"{path}: skc: schema {state.get('schema')!r}, step {found!r}: not a checkpoint of this version; "
                "delete it to train from the start"
            )
        if type(state.get("dtype")) is not str:
            raise RunError(f"{path}: skc: dtype: {state.get('dtype')!r}, expected the name of a type")
        if type(state.get("quantise")) is not bool:
            raise RunError(f"{path}: skc: quantise: {state.get('quantise')!r}, expected true or false")
        if type(seconds) not in (int, float) or not 0 <= seconds < 2.0**1023:  # a float can hold it
            raise RunError(f"{path}: skc: seconds: {seconds!r}, expected a number from 0 up")
        sides = {side: {} for side in ("param", "optim")}
        for key, value in arrays.items():
            side, _, name = key.partition("/")
            if side not in sides:
                raise RunError(f"{path}: {key}: unknown tensor")
            sides[side][name] = value
        try:
            check_arrays(sides["param"], {n: row.shape for n, row in param_table(self.config.model).items()}, str(path))
            slots = optimizer_slots(self.config.model, self.config.train)
            check_arrays(sides["optim"], slots, f"{path}: optimizer state")
        except ValueError as error:
            raise RunError(str(error)) from error
        if state.get("sha256") != _digest(arrays):
            raise RunError(f"{path}: skc: sha256: the tensors are not the ones that were saved; delete it")
        if step not in (None, found):
            raise RunError(f"{path}: holds step {found}, not {step}: it was renamed; delete it")
        return Checkpoint(found, float(seconds), sides["param"], sides["optim"], state["dtype"], state["quantise"])

    def restore(self, engine: Engine) -> tuple[int, float]:
        """Load the checkpoint into `engine` and return (steps done, training seconds); (0, 0) where there is none.

        Metrics after the checkpoint's step are dropped, so that nothing is recorded twice. ConfigError if the engine
        computes in another type than the run was trained in.
        """
        saved = self.checkpoint()
        if saved and saved.dtype != engine.dtype:
            raise ConfigError(
                f"{self.path}: was trained in {saved.dtype}, this would go on in {engine.dtype}: "
                f"add --dtype {saved.dtype}, or choose another --out"
            )
        step, seconds = (saved.step, saved.seconds) if saved else (0, 0.0)
        _share(engine.ranks, saved)
        if saved:
            try:
                engine.load_params(saved.params, saved.quantise)
                engine.load_optimizer(saved.optimizer)
            except ValueError as error:
                raise RunError(f"{self.checkpoint_path}: {error}; delete it to train from the start") from error
            if not self.kept_path(step).exists():  # a kill may have come before it got that name
                self._keep(step)
        kept = [row for row in self.metrics() if row["step"] <= step] if saved else []
        replace_file(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        if self.copies is not None:
            self.copies.rows(kept)
        return step, seconds


class Follower(Run):
    """A run as ranks other than 0 see it: its settings. They write nothing, and read what rank 0 read."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Leave it to rank 0."""

    def save(self, engine: Engine, step: int, seconds: float) -> None:
        """Give rank 0 what this rank knows of the optimizer's state."""
        engine.optimizer()

    def restore(self, engine: Engine) -> tuple[int, float]:
        """Load the checkpoint that rank 0 read."""
        saved = _share(engine.ranks, None)
        if saved is None:
            return 0, 0.0
        engine.load_params(saved.params, saved.quantise)
        engine.load_optimizer(saved.optimizer)
        return saved.step, saved.seconds


def _share(ranks: Ranks, saved: Checkpoint | None) -> Checkpoint | None:
    """Return rank 0's checkpoint on every rank."""
    if ranks.world == 1:
        return saved
    head = agree(ranks, saved and {k: v for k, v in saved._asdict().items() if k not in ("params", "optimizer")})
    if head is None:
        return None
    params = share_arrays(ranks, saved and saved.params)
    return Checkpoint(**head, params=params, optimizer=share_arrays(ranks, saved and saved.optimizer))


def config_digest(config: RunConfig) -> str:
    """Return the sha256 of all settings but the seed, those that do not decide the weights, and the data's place.

    A field that came later counts where it is not at its default, so that runs keep their digest.
    """
    value, defaults = to_json(config), to_json(RunConfig())
    kept = {
        f"{part}.{name}": setting
        for part, settings in value.items() if isinstance(settings, dict)
        for name, setting in settings.items() if name not in LATER or setting != defaults[part][name]
    }  # fmt: skip
    kept = {name: setting for name, setting in kept.items() if not name.startswith((*FREE, "data."))}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class _Named(io.FileIO):
    """A file whose failed writes say which file it is."""

    def write(self, data: Any, /) -> int:
        """Write as every file does."""
        with naming(self.name):
            return super().write(data)


def _digest(arrays: Arrays) -> str:
    """Return the sha256 of all arrays, in the order of their names."""
    state = hashlib.sha256()
    for _, value in sorted(arrays.items()):
        state.update(np.ascontiguousarray(value).data)
    return state.hexdigest()


def _tensor(path: Path, file: Any, key: str) -> np.ndarray:
    kind = file.get_slice(key).get_dtype()
    if kind not in ("F32", "F64"):
        raise RunError(f"{path}: {key}: dtype {kind}, expected F32 or F64")
    return file.get_tensor(key)


def _strangers(path: Path) -> list[str]:
    """Return what is in a folder, less the temporary file that a kill during `create` leaves."""
    return [name for name in os.listdir(path) if name != "state" and not TEMPORARY.search(name)]


def _drop_cut_line(path: Path) -> None:
    """Cut a file back to its last whole line: a kill or a full disk may have left part of one."""
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        if end != size:
            file.truncate(end)


def _refuse_differences(run: Run, config: RunConfig, tokenizer: bytes, data: Any) -> None:
    """Raise ConfigError if the run was begun on other data, or has a checkpoint made with other settings."""
    if run.tokenizer_path.exists() and run.tokenizer_path.read_bytes() != tokenizer:
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
        return from_json(RunConfig, _read_json(path), str(path))
    except ConfigError as error:
        raise RunError(
            f"{error}; the run's settings are damaged" if str(path) not in str(error) else str(error)
        ) from error


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise RunError(f"{path}: over {MAX_TEXT} bytes; this is not a file of a run")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not UTF-8: {error.reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(str(path), _read_text(path))


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: not JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)
