"""What a log of ours says, line by line: a value of the wrong kind is a problem of the log, an unknown line is none."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from core.files import FileError, parse_json
from core.submission.logs import VERSION

MAX_LOG = 4 << 20
"""Bytes of the longest log that is read; the published ones have at most 0.2 MB."""
MAX_LINES = 100_000
MAX_LINE = 1 << 20
MAX_PROBLEMS = 20


def read_whole(text: str) -> int:
    """Return a whole number from 0 up; ValueError."""
    if not re.fullmatch(r"\d{1,16}", text, re.ASCII):
        raise ValueError("a whole number from 0 up")
    return int(text)


def read_finite(text: str) -> float:
    """Return a finite number from 0 up; ValueError."""
    if re.fullmatch(r"\d{1,16}(\.\d{1,32})?(e[+-]?\d{1,3})?", text, re.ASCII | re.IGNORECASE):
        value = float(text)
        if math.isfinite(value):
            return value
    raise ValueError("a finite number from 0 up")


def read_digest(text: str) -> str:
    """Return a SHA-256 in hexadecimal digits; ValueError."""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("64 hexadecimal digits")
    return text


def read_words(text: str) -> str:
    """Return a text of at most 1,000 letters; ValueError."""
    if not text or len(text) > 1000:
        raise ValueError("a text of 1 to 1,000 letters")
    return text


def read_truth(text: str) -> bool:
    """Return true or false; ValueError."""
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def read_table(text: str) -> dict[str, Any]:
    """Return a JSON object; ValueError."""
    try:
        value = parse_json("it", text)
    except FileError as error:
        raise ValueError("a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError("a JSON object")
    return value


def read_texts(text: str) -> list[str]:
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
         "val_targets", "val_bytes", "val_documents", "artifact_bytes", "total_bytes"), read_whole),
    **dict.fromkeys(
        ("train_seconds", "closed_seconds", "step_avg_ms", "weights_val_loss", "weights_val_bpb", "exported_val_loss",
         "exported_val_bpb", "val_loss", "val_bpb", "eval_seconds", "eval_strict_seconds"), read_finite),
    **dict.fromkeys(("config_sha256", "code_sha256", "artifact_sha256", "tokenizer_sha256"), read_digest),
    **dict.fromkeys(("settings", "versions", "data"), read_table),
    **dict.fromkeys(("code_form", "backend", "device", "dtype", "stop_reason", "val_windows", "val_byte_rule",
                     "val_adaptation", "transform"), read_words),
    "val_full": read_truth, "val_plugins": read_texts,
}  # fmt: skip
"""Name of a line -> how its value is read."""
STEP = re.compile(r"step:(\d{1,12})/(\d{1,12}) train_loss:(\S{1,40})")


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
        if key == "skc_log" and not problem and values[key] != VERSION:
            problem = f"skc_log: version {values[key]}, only {VERSION} is known here: its lines may mean something else"
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
        read_finite(match[3])
    except ValueError as error:
        return 0, "", f"train_loss: {match[3]!r}, expected {error}"
    return int(match[1]), match[3], ""


def _value(key: str, text: str) -> tuple[Any, str]:
    """Return the value of a known line, and what is wrong with it."""
    try:
        return FIELDS[key](text), ""
    except ValueError as error:
        return None, f"{key}: {text[:60]!r}, expected {error}"
