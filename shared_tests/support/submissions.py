"""Finished runs as a packed program leaves them on 8 H100, written by hand, and the folder that is made of them.

The program is a stand-in that names a model and trains none: whole ones are in shared_tests/submission/test_whole.py.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from core.config import RunConfig, changed, to_json
from core.data.bundled import BUNDLED, TOKENIZERS
from core.presets import PRESETS
from core.submission.logs import program_described
from core.submission.submission_json import Author
from core.submission.writing import SubmissionOrder, Written, write_submission
from core.training.run import Run, config_digest

SEEDS = (42, 314, 999)
TARGETS, BYTES = 62_021_632, 151_077_600
ABOUT = Author("A. Writer", "awriter", "Small & packed", "A tiny model.", "2026-04-30", ("nobody: nothing",))
PROGRAM = (
    "import numpy\n\n\nclass Model:\n    def forward(self, x):\n        return numpy.matmul(x, self.weight)\n\n\n"
    + "".join(f"SETTING_{i} = {i}  # one of many lines\n" for i in range(40))
).encode()
VERSIONS = {"python": "3.11.7", "numpy": "2.4.6", "torch": "2.9.1+cu128", "sentencepiece": "0.2.3"}


def config_of(seed: int) -> RunConfig:
    """Return the settings of a run."""
    small = dataclasses.replace(PRESETS["debug"].config, seed=seed)
    settings = {"train.steps": 20_000, "train.seconds": 600.0, "train.reserve_seconds": 8.0, "eval.documents": None}
    return changed(small, settings)


def score(bpb: float, **changes: Any) -> dict[str, Any]:
    """Return a Score of the whole published text."""
    loss = bpb * math.log(2.0) * BYTES / TARGETS
    whole = {
        "label": "score", "bpb": bpb, "byte_rule": "table", "nats": loss * TARGETS, "targets": TARGETS, "bytes": BYTES,
        "loss": loss, "documents": 50_000, "total_documents": 50_000, "full": True, "error": None, "bpb_raw": None,
        "windows": "plain seq=64", "plugins": [],
    }  # fmt: skip
    return whole | changes


def write_run(place: Path, seed: int, program: bytes | None = PROGRAM, **changes: Any) -> Run:
    """Write the records of a finished run of `seed`; `changes` replace entries of env.json."""
    path = place / f"run{seed}"
    path.mkdir(parents=True)
    config = changed(config_of(seed), {"data.path": str(place / "shards")})  # a place of this machine
    (path / "config.json").write_text(json.dumps(to_json(config)))
    (path / "tokenizer.model").write_bytes((BUNDLED / TOKENIZERS["sample"]).read_bytes())
    (path / "artifact.skc").write_bytes(bytes(range(256)) * 40 + str(seed).encode())
    env = {
        "command": "train_gpt.py", "backend": "cuda", "device": "NVIDIA H100 80GB HBM3", "ranks": 8,
        "dtype": "bfloat16", "versions": VERSIONS, "data": {"name": "fineweb_sp1024", "sha256": "1" * 64},
        "train_tokens": 8_000_000_000, "val_tokens": TARGETS + 1, "transform": "none", "tokenizer_sha256": "2" * 64,
    }  # fmt: skip
    if program is not None:
        env |= program_described(program, "text").to_json()
        (path / "train_gpt.py").write_bytes(program)
    (path / "env.json").write_text(json.dumps(env | changes))
    bpb = 1.08 + seed / 1e6 + 1e-9
    rows = [
        {
            "step": step,
            "train/loss": 6.0 - step / 5000 + seed / 1e5,
            "clock/seconds": step * 0.1234,
            "perf/step_ms": 1.0,
        }
        for step in (1, 2, 1000, 4790)
    ]
    rows.append({"step": 4790, "val/bpb": bpb + 0.01, "val/error": 0.001})
    rows.append({"step": 4790, "clock/stopped": 591.25, "clock/closed": 595.5})
    stored = {"score": score(bpb), "bytes": (path / "artifact.skc").stat().st_size, "gap": 0.002, "within": True}
    times = {"clock/scoring": 88.25, "clock/scoring_strict": 121.0 + seed / 1e4}
    rows.append({"step": 4790, "final/score": score(bpb - 0.002), "final/artifact": stored, **times})
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Run.open(path)


def write_audit(run: Run, **verdicts: str) -> None:
    """Write what an audit of a run found: PASS for every rule but D17, and those of `verdicts`."""
    folder = run.path / "audit"
    folder.mkdir()
    findings = [
        {"rule": f"D{i}", "verdict": verdicts.get(f"D{i}", "NOT CHECKED" if i == 17 else "PASS"),
         "evidence": f"looked at {run.path.resolve()}/artifact.skc and {run.path.resolve().parent}/data/shard.bin",
         "details": {"at": str(run.path)}}
        for i in range(1, 19)
    ]  # fmt: skip
    value = {
        "subject": str(run.artifact_path), "findings": findings, "evaluation": {"clock": 130.0}, "error": None,
        "config_sha256": config_digest(run.config), "seconds": 200.0,
        "artifact_sha256": hashlib.sha256(run.artifact_path.read_bytes()).hexdigest(),
    }  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(value))


def write_runs(place: Path, **changes: Any) -> tuple[Run, ...]:
    """Write the audited runs of all seeds."""
    runs = tuple(write_run(place, seed, **changes) for seed in SEEDS)
    for run in runs:
        write_audit(run)
    return runs


def submitted(place: Path, runs: tuple[Run, ...] | None = None, **changes: Any) -> Written:
    """Write runs below a place, and the folder that is made of them; `changes` replace entries of the order."""
    runs = write_runs(place / "runs") if runs is None else runs
    order = SubmissionOrder(runs, ABOUT, place / "out", "text")._replace(**changes)
    return write_submission(order, lambda line: None)
