"""Logs in the habits of the public records: no schema, several spellings of one figure, text between the lines."""

import re
from dataclasses import replace
from typing import Any

from core.submission.logs import MAX_PROBLEMS, Log, finite, whole

NUMBER = r"([^\s,;)]{1,40})"
FIGURES: dict[str, tuple[str, ...]] = {
    "parameters": (rf"model_params:\s*{NUMBER}",),
    "train_tokens": (rf"train_tokens:\s*{NUMBER}",),
    "val_tokens": (rf"val_loader:.*tokens:\s*{NUMBER}", rf"val_tokens:\s*{NUMBER}"),
    "ranks": (rf"world_size:\s*{NUMBER}",),
    "code_bytes": (rf"Code size.*:\s*{NUMBER} bytes",),
    "artifact_bytes": (rf"Serialized model \S.*?:\s*{NUMBER} bytes",),
    "total_bytes": (rf"Total submission size.*:\s*{NUMBER} bytes",),
    "stop_step": (rf"stopping_early:.*step:\s*{NUMBER}/",),
}
"""Figure -> patterns of the lines that hold it; the last line counts."""
PATTERNS = [(name, re.compile(text)) for name, patterns in FIGURES.items() for text in patterns]
SCORED = re.compile(rf"(?P<what>\S.*?)\s+val_loss:\s*{NUMBER}\s+val_bpb:\s*{NUMBER}(?:.*eval_time:\s*(\d{{1,12}})ms)?")
STEP = re.compile(rf"(?:step:\s*)?(\d{{1,12}})/(\d{{1,12}})\s+train_loss:\s*{NUMBER}")
TIME = re.compile(r"train_time:\s*(\d{1,12})ms")
PACE = re.compile(r"step_avg:\s*([\d.]{1,20})ms")
SEED = re.compile(r"\s*seed\s*[:=]\s*(\d{1,10})\s*$", re.IGNORECASE)
NAMED_SEED = re.compile(r"seed[_-]?(\d{1,10})", re.IGNORECASE)


def parse_public_log(name: str, lines: list[str]) -> Log:
    """Return what the lines of a log say: of every figure the last one, the score of the last evaluation."""
    values: dict[str, Any] = {}
    losses: list[tuple[int, str]] = []
    problems: list[str] = []
    seeds: list[int] = []

    def note(place: int, key: str, text: str, read: Any) -> None:
        try:
            values[key] = read(text.replace(",", ""))
        except ValueError as error:
            if len(problems) < MAX_PROBLEMS:
                problems.append(f"{name}:{place}: {key}: {text[:60]!r}, expected {error}")

    for place, line in enumerate(lines, 1):
        line = line[: min(len(line), 2000)]
        if "{" in line and "}" in line:  # a line of the script that the log begins with
            continue
        for key, pattern in PATTERNS:
            if match := pattern.search(line):
                note(place, key, match[1], whole)
        if match := SEED.match(line):
            seeds.append(int(match[1]))
        if match := STEP.match(line):
            losses.append((int(match[1]), match[3]))
        if (match := TIME.search(line)) and "/" in line:
            values["train_seconds"] = int(match[1]) / 1000
        if (match := PACE.search(line)) and "/" in line:
            note(place, "step_avg_ms", match[1], finite)
        if (match := SCORED.match(line)) and not re.match(r"(step:\s*)?\d+/\d+", line):
            _score(match, place, values, note)
    seed = int(match[1]) if (match := NAMED_SEED.search(name)) else seeds[0] if seeds else None
    if seed is None:
        problems.append(f"{name}: says no seed, neither in its name nor in a line")
    return replace(Log(name, seed=seed, losses=tuple(losses), problems=tuple(problems)), **values)


def _score(match: re.Match[str], place: int, values: dict[str, Any], note: Any) -> None:
    """Note the score of an evaluation: the last one is the claim, that before export is named so."""
    before = re.search(r"pre-quant|post.ema", match["what"], re.IGNORECASE)
    prefix = "weights_" if before else ""
    note(place, f"{prefix}val_loss", match[2], finite)
    note(place, f"{prefix}val_bpb", match[3], finite)
    if match[4] and not before:
        values["eval_seconds"] = int(match[4]) / 1000
