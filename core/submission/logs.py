"""The log of a submitted run: written from the run's records, and read back from anyone's file.

A line is `name: value`, or `step:S/N name:value ...` as the challenge's own scripts write it. A log holds no path, user
or name of a machine.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.config import to_json
from core.files import FileError, decode_text, open_file, parse_json, read_file
from core.model.params import count
from core.training.records import RunError
from core.training.run import Run, config_digest

VERSION = 1
MAX_LOG = 16 << 20
"""Bytes of the longest log that is read; the published ones have at most 0.2 MB."""
MAX_LINE = 1 << 20
MAX_PROBLEMS = 20
PLACES = (
    "backend", "device", "ranks", "dtype", "versions", "data", "train_tokens", "val_tokens", "tokenizer_sha256",
    "transform",
)  # fmt: skip
"""What a log says of where a run was made, and of what."""


@dataclass(frozen=True)
class Program:
    """The file that a run was made by, as env.json names it: program_sha256, program_bytes, program_form."""

    sha256: str
    bytes: int
    form: str
    """text or zip."""

    def to_json(self) -> dict[str, Any]:
        """Return the entries of env.json."""
        return {"program_sha256": self.sha256, "program_bytes": self.bytes, "program_form": self.form}


def described(data: bytes, form: str) -> Program:
    """Return the description of a program's file."""
    return Program(hashlib.sha256(data).hexdigest(), len(data), form)


def program_of(environment: dict[str, Any]) -> Program | None:
    """Return the program that env.json names for every start of a run, or None: then a checkout made it."""
    starts = [environment, *environment.get("earlier", [])]
    named = {tuple(start.get(name) for name in Program("", 0, "").to_json()) for start in starts}
    if len(named) != 1 or None in (only := next(iter(named))):
        return None
    return Program(*only)


def log_lines(run: Run) -> list[str]:
    """Return the log of a finished run, line by line; RunError if it has not come to its end."""
    rows = [line for row in run.metrics() for line in row_lines(run.config.train.steps, row)]
    return [*opening_lines(run), *rows, *closing_lines(run)]


def opening_lines(run: Run) -> list[str]:
    """Return what a log says before the first step: settings, sizes, versions, and the program that runs."""
    environment, program = run.environment(), program_of(run.environment())
    settings = to_json(run.config)
    settings["data"] = {}  # a path of some machine: `data` names the text instead
    facts: dict[str, Any] = {
        "skc_log": VERSION,
        "seed": run.config.seed,
        "settings": settings,
        "config_sha256": config_digest(run.config),
        "parameters": count(run.config.model),
        "code_form": program.form if program else "checkout",
        "code_bytes": program.bytes if program else run.config.export.code_bytes,
        "code_sha256": program.sha256 if program else None,
    }
    for name in PLACES:
        facts[name] = environment.get(name)
    return _lines(facts)


def row_lines(steps: int, row: dict[str, Any]) -> list[str]:
    """Return the lines of a row of metrics.jsonl in a run of `steps` steps: its loss, its validation estimate."""
    at, lines = f"step:{row['step']}/{steps}", []
    if "train/loss" in row:
        time = f" train_time:{1000 * row['clock/seconds']:.0f}ms"
        pace = f" step_avg:{row['perf/step_ms']:.2f}ms" if "perf/step_ms" in row else ""
        lines.append(f"{at} train_loss:{row['train/loss']:.6f}{time}{pace}")
    if "val/bpb" in row:
        spread = f" val_error:{row['val/error']:.8f}" if "val/error" in row else ""
        lines.append(f"{at} val_bpb:{row['val/bpb']:.8f}{spread}")
    return lines


def closing_lines(run: Run) -> list[str]:
    """Return what a log says of the end of a run: why it stopped, its scores, times, and the artifact; RunError."""
    stored, weights = run.last("final/artifact"), run.last("final/score")
    if stored is None or weights is None or not run.artifact_path.is_file():
        raise RunError(f"{run.path}: has not come to its end, so there is no score to report: train it to its end")
    final = (run.last("final/plugins") if run.config.eval.learns else None) or stored["score"]
    steps = next(row["step"] for row in reversed(run.metrics()) if "final/artifact" in row)
    seconds = run.last("clock/stopped") or run.last("clock/seconds")
    code = program_of(run.environment())
    code_bytes = code.bytes if code else run.config.export.code_bytes
    facts = {
        "stop_reason": "steps" if steps >= run.config.train.steps else "wallclock_cap",
        "stop_step": steps,
        "train_seconds": seconds,
        "closed_seconds": run.last("clock/closed"),
        "step_avg_ms": 1000 * seconds / steps if seconds and steps else None,
        "weights_val_loss": weights["loss"],
        "weights_val_bpb": weights["bpb"],
        "exported_val_loss": stored["score"]["loss"],
        "exported_val_bpb": stored["score"]["bpb"],
        "val_loss": final["loss"],
        "val_bpb": final["bpb"],
        **{f"val_{name}": final[name] for name in ("targets", "bytes", "documents", "full", "windows", "byte_rule")},
        "val_plugins": final.get("plugins") or [],
        "val_adaptation": final.get("adaptation") or None,
        "eval_seconds": run.last("eval/seconds"),
        "eval_strict_seconds": run.last("eval/strict"),
        "artifact_bytes": stored["bytes"],
        "artifact_sha256": file_sha256(run.artifact_path),
        "total_bytes": stored["bytes"] + code_bytes,
    }
    return _lines(facts)


def file_sha256(path: Path, limit: int = 1 << 32) -> str:
    """Return the SHA-256 of a regular file; FileError, OSError."""
    with open_file(path, limit) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(facts: dict[str, Any]) -> list[str]:
    return [f"{name}: {_shown(name, value)}" for name, value in facts.items() if value is not None]


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{3 if name.endswith(('seconds', 'ms')) else 8}f}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def whole(text: str) -> int:
    """Return a whole number from 0 up; ValueError."""
    if not re.fullmatch(r"\d{1,16}", text, re.ASCII):
        raise ValueError("a whole number from 0 up")
    return int(text)


def finite(text: str) -> float:
    """Return a finite number from 0 up; ValueError."""
    if re.fullmatch(r"\d{1,16}(\.\d{1,32})?(e[+-]?\d{1,3})?", text, re.ASCII | re.IGNORECASE):
        value = float(text)
        if math.isfinite(value):
            return value
    raise ValueError("a finite number from 0 up")


def digest(text: str) -> str:
    """Return a SHA-256 in hexadecimal digits; ValueError."""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("64 hexadecimal digits")
    return text


def words(text: str) -> str:
    """Return a text of at most 1,000 letters; ValueError."""
    if not text or len(text) > 1000:
        raise ValueError("a text of 1 to 1,000 letters")
    return text


def truth(text: str) -> bool:
    """Return true or false; ValueError."""
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def table(text: str) -> dict[str, Any]:
    """Return a JSON object; ValueError."""
    try:
        value = parse_json("it", text)
    except FileError as error:
        raise ValueError("a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError("a JSON object")
    return value


def texts(text: str) -> list[str]:
    """Return a JSON list of texts; ValueError."""
    try:
        value = parse_json("it", text)
    except FileError as error:
        raise ValueError("a JSON list of texts") from error
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError("a JSON list of texts")
    return value


@dataclass(frozen=True)
class Log:
    """What a log says; None: it does not say it."""

    name: str
    """Name of the file."""
    skc_log: int | None = None
    """Version of our format; None: someone else's."""
    seed: int | None = None
    settings: dict[str, Any] | None = None
    config_sha256: str | None = None
    parameters: int | None = None
    code_form: str | None = None
    code_bytes: int | None = None
    code_sha256: str | None = None
    backend: str | None = None
    device: str | None = None
    ranks: int | None = None
    dtype: str | None = None
    versions: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    train_tokens: int | None = None
    val_tokens: int | None = None
    tokenizer_sha256: str | None = None
    transform: str | None = None
    """What was done to a text before it became tokens."""
    stop_reason: str | None = None
    stop_step: int | None = None
    train_seconds: float | None = None
    closed_seconds: float | None = None
    """When the training text was closed: calibration included."""
    step_avg_ms: float | None = None
    weights_val_loss: float | None = None
    weights_val_bpb: float | None = None
    """Of the weights before export."""
    exported_val_loss: float | None = None
    exported_val_bpb: float | None = None
    """Of the artifact, before anything learned from the validation text."""
    val_loss: float | None = None
    val_bpb: float | None = None
    """The claim."""
    val_targets: int | None = None
    val_bytes: int | None = None
    val_documents: int | None = None
    val_full: bool | None = None
    val_windows: str | None = None
    val_byte_rule: str | None = None
    val_plugins: list[str] | None = None
    val_adaptation: str | None = None
    eval_seconds: float | None = None
    eval_strict_seconds: float | None = None
    """From before the artifact is read and decompressed to the last score."""
    artifact_bytes: int | None = None
    artifact_sha256: str | None = None
    total_bytes: int | None = None
    losses: tuple[tuple[int, str], ...] = ()
    """(step, training loss as printed)."""
    hyper: dict[str, str] = field(default_factory=dict)
    """Settings by their names, as printed: the hyper-parameters of a public log."""
    problems: tuple[str, ...] = field(default=())
    """What cannot be read as what it is named."""


FIELDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(
        ("skc_log", "seed", "parameters", "code_bytes", "ranks", "train_tokens", "val_tokens", "stop_step",
         "val_targets", "val_bytes", "val_documents", "artifact_bytes", "total_bytes"), whole),
    **dict.fromkeys(
        ("train_seconds", "closed_seconds", "step_avg_ms", "weights_val_loss", "weights_val_bpb", "exported_val_loss",
         "exported_val_bpb", "val_loss", "val_bpb", "eval_seconds", "eval_strict_seconds"), finite),
    **dict.fromkeys(("config_sha256", "code_sha256", "artifact_sha256", "tokenizer_sha256"), digest),
    **dict.fromkeys(("settings", "versions", "data"), table),
    **dict.fromkeys(("code_form", "backend", "device", "dtype", "stop_reason", "val_windows", "val_byte_rule",
                     "val_adaptation", "transform"), words),
    "val_full": truth, "val_plugins": texts,
}  # fmt: skip
"""Name of a line -> how its value is read."""
STEP = re.compile(r"step:(\d{1,12})/(\d{1,12}) train_loss:(\S{1,40})")


def read_log(path: Path) -> Log:
    """Return what a log says, ours or one in the habits of the public records; FileError for no text, OSError.

    Lines that nobody knows are passed over; a known one with a bad value is a problem of the log.
    """
    lines = decode_text(path, read_file(path, MAX_LOG, follow=False)).split("\n")
    if any(line.startswith("skc_log:") for line in lines[:50]):
        return parse_log(path.name, lines)
    from core.submission.public_logs import parse_public_log

    return parse_public_log(path.name, lines)


def parse_log(name: str, lines: list[str]) -> Log:
    """Return what the lines of a log in our format say."""
    values: dict[str, Any] = {}
    losses: list[tuple[int, str]] = []
    problems: list[str] = []
    for place, key, text in _named(lines):
        if key == "step":
            step, loss, problem = _step(text)
            losses += [(step, loss)] if not problem else []
        else:
            value, problem = _value(key, text)
            if not problem and key in values and values[key] != value:
                problem = f"{key}: {text[:60]!r}, but an earlier line says {values[key]!r}"[:300]
            values |= {} if problem else {key: value}
        if problem and len(problems) < MAX_PROBLEMS:
            problems.append(f"{name}:{place}: {problem}")
    return replace(Log(name, losses=tuple(losses), problems=tuple(problems)), **values)


def _named(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (number, name, text) of the lines that have a known name; those of a step are named step."""
    for place, line in enumerate(lines, 1):
        if STEP.match(line):
            yield place, "step", line
            continue
        key, mark, text = line[:MAX_LINE].partition(": ")
        if mark and key in FIELDS:
            yield place, key, text.strip()


def _step(line: str) -> tuple[int, str, str]:
    """Return (step, loss as printed, what is wrong) of a line of a training step."""
    match = STEP.match(line)
    assert match
    try:
        finite(match[3])
    except ValueError as error:
        return 0, "", f"train_loss: {match[3]!r}, expected {error}"
    return int(match[1]), match[3], ""


def _value(key: str, text: str) -> tuple[Any, str]:
    """Return the value of a known line, and what is wrong with it."""
    try:
        return FIELDS[key](text), ""
    except ValueError as error:
        return None, f"{key}: {text[:60]!r}, expected {error}"
