"""Logs in the habits of the public records: no schema, several spellings of one figure, text between the lines."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.files import FileError, decode_text, read_file
from core.submission.log_values import MAX_LINES, MAX_LOG, MAX_PROBLEMS, Log, parse_log, read_finite, read_whole

NUMBER = r"([\d.][\w.,+-]{0,40}|-?(?:nan|inf)\b)"
FIGURES: dict[str, str] = {
    "parameters": rf"model_params:\s*{NUMBER}", "train_tokens": rf"train_tokens:\s*{NUMBER}",
    "val_tokens": rf"(?:val_loader:.*tokens|val_tokens):\s*{NUMBER}", "ranks": rf"world_size:\s*{NUMBER}",
    "code_bytes": rf"Code size.*:\s*{NUMBER} bytes", "artifact_bytes": rf"Serialized model \S.*?:\s*{NUMBER} bytes",
    "total_bytes": rf"Total submission size.*:\s*{NUMBER} bytes", "stop_step": rf"stopping_early:.*step:\s*{NUMBER}/",
}  # fmt: skip
"""Figure -> pattern of the lines that hold it; the last line counts."""
PATTERNS = [(name, re.compile(text)) for name, text in FIGURES.items()]
SECONDS = {
    "hessians": re.compile(r"collected \d{1,6} Hessians in ([\d.]{1,20})s"),
    "reading": re.compile(r"decompression done in ([\d.]{1,20})s"),
    "compiling": re.compile(r"compile warmup done \(([\d.]{1,20})s\)"),
}
"""What a log times beside training and the last evaluation."""
SCORED = re.compile(
    rf"(?P<what>\S.{{0,200}}?)\s+val_loss:\s*{NUMBER}\s+val_bpb:\s*{NUMBER}(?:.*eval_time:\s*(\d{{1,12}})ms)?"
)
STEP = re.compile(rf"(?:step:\s*)?(\d{{1,12}})/(\d{{1,12}})\s+train_loss:\s*{NUMBER}")
COUNTED = re.compile(r"(step:\s*)?\d+/\d+")
TIME = re.compile(r"train_time:\s*(\d{1,12})ms")
PACE = re.compile(r"step_avg:\s*([\d.]{1,20})ms")
SEED = re.compile(r"\s*seed\s*[:=]\s*(\d{1,10})\s*$", re.IGNORECASE)
NAMED_SEED = re.compile(r"seed[_-]?(\d{1,10})", re.IGNORECASE)
SETTING = re.compile(r"  ([a-z][a-z0-9_]{1,60}): (\S.{0,200})")
PAIR = re.compile(r"(?<!\S)([a-z][a-z0-9_]{1,60}):([\d.][\w.+-]{0,40}|True|False)(?!\S)")
MAX_SETTINGS = 1000
MAX_LINE = 2000


def read_log(path: Path) -> Log:
    """Return what a log says, ours or one in the habits of the public records; FileError for no text, OSError.

    Lines that nobody knows are passed over; a known one with a bad value is a problem of the log.
    """
    lines = decode_text(path, read_file(path, MAX_LOG, follow=False)).split("\n")
    if len(lines) > MAX_LINES:
        raise FileError(f"{path}: {len(lines):,} lines, expected at most {MAX_LINES:,}; this is no log of a run")
    ours = any(line.startswith("skc_log:") for line in lines[:50])
    return parse_log(path.name, lines) if ours else parse_public_log(path.name, lines)


def parse_public_log(name: str, lines: list[str]) -> Log:
    """Return what the lines of a log say: of every figure the last one, the score of the last evaluation."""
    values: dict[str, Any] = {}
    losses: list[tuple[int, str]] = []
    problems: list[str] = []
    hyper: dict[str, str] = {}
    times: dict[str, float] = {}

    def note(place: int, key: str, text: str, read: Callable[[str], Any]) -> None:
        try:
            values[key] = read(text.replace(",", ""))
        except ValueError as error:
            if len(problems) < MAX_PROBLEMS:
                problems.append(f"{name}:{place}: {key}: {text[:60]!r}, expected {error}")

    for place, line in enumerate(lines, 1):
        line = line[:MAX_LINE]
        if "{" in line and "}" in line:  # of the script, which many logs begin with
            continue
        for key, pattern in PATTERNS:
            if match := pattern.search(line):
                note(place, key, match[1], read_whole)
        for key, pattern in SECONDS.items():
            if (match := pattern.search(line)) and re.fullmatch(r"\d+(\.\d+)?", match[1]):
                times[key] = float(match[1])
        if match := STEP.match(line):
            losses.append((int(match[1]), match[3]))
        if (match := TIME.search(line)) and "/" in line:
            values["train_seconds"] = int(match[1]) / 1000
        if (match := PACE.search(line)) and "/" in line:
            note(place, "step_avg_ms", match[1], read_finite)
        counted = COUNTED.match(line)
        if (match := SCORED.match(line)) and not counted:
            _score(match, place, values, note)
        elif not losses and not counted and len(hyper) < MAX_SETTINGS:
            hyper |= _settings(line)
    _add_up(values, times)
    lead = (SEED.match(line) for line in lines if len(line) < 100)
    seed = int(match[1]) if (match := NAMED_SEED.search(name)) else next((int(m[1]) for m in lead if m), None)
    if seed is None and (text := hyper.get("seed", "")).isdecimal():
        seed = int(text[:10])
    if seed is None:
        problems.append(f"{name}: says no seed, neither in its name nor in a line")
    log = Log(name, seed=seed, losses=tuple(losses), hyper=hyper, problems=tuple(problems))
    return replace(log, **values)


def _settings(line: str) -> dict[str, str]:
    if match := SETTING.fullmatch(line.rstrip()):
        return {match[1]: match[2]}
    return dict(PAIR.findall(line))


def _score(match: re.Match[str], place: int, values: dict[str, Any], note: Callable[..., None]) -> None:
    """Note the score of an evaluation: the last one is the claim, that before export is named so."""
    before = re.search(r"pre-quant|post.ema", match["what"], re.IGNORECASE)
    prefix = "weights_" if before else ""
    note(place, f"{prefix}val_loss", match[2], read_finite)
    note(place, f"{prefix}val_bpb", match[3], read_finite)
    if match[4] and not before:
        values["eval_seconds"] = int(match[4]) / 1000


def _add_up(values: dict[str, Any], times: dict[str, float]) -> None:
    """Add what was timed apart: calibration to training, reading and compiling to the evaluation."""
    if "hessians" in times and "train_seconds" in values:
        values["closed_seconds"] = values["train_seconds"] + times["hessians"]
    if "eval_seconds" in values:
        more = times.get("reading", 0.0) + times.get("compiling", 0.0)
        values["eval_strict_seconds"] = values["eval_seconds"] + more
