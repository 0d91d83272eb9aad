"""The log of a submitted run, written from the run's records.

A line is `name: value`, or `step:S/N name:value ...` as the challenge's own scripts write it. A log holds no path, user
or name of a machine.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from core.config import to_json
from core.data.shards import file_sha256
from core.model.params import count
from core.training.records import RunError
from core.training.run import Run, config_digest

VERSION = 1
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


def program_described(data: bytes, form: str) -> Program:
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


def opening_lines(run: "Run | Any") -> list[str]:
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


def closing_lines(run: "Run | Any") -> list[str]:
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
        "eval_seconds": run.last("clock/scoring"),
        "eval_strict_seconds": run.last("clock/scoring_strict"),
        "artifact_bytes": stored["bytes"],
        "artifact_sha256": file_sha256(str(run.artifact_path)),
        "total_bytes": stored["bytes"] + code_bytes,
    }
    return _lines(facts)


def _lines(facts: dict[str, Any]) -> list[str]:
    return [f"{name}: {_shown(name, value)}" for name, value in facts.items() if value is not None]


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{3 if name.endswith(('seconds', 'ms')) else 8}f}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
