"""Folders of runs that nobody trained: every state that `skc runs` tells apart, and a store of an ablation."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from core import presets
from core.config import changed
from core.formats.tensors import write_tensors
from core.training.run import Run
from shared_tests.support.ablation_worker import whole_score
from shared_tests.support.searches import PLAN, Runs, read

TEXT = {"name": "sample", "sha256": "a" * 64}


def run(folder: Path, bpb: float | None = None, seed: int = 1, lines: int = 3, **settings: Any) -> Run:
    """Make a run of `lines` lines of a loss, finished with `bpb` if there is one."""
    fields = {"train.steps": 40, **{name.replace("__", "."): value for name, value in settings.items()}}
    data = fields.pop("text", TEXT)
    score = fields.pop("score", {})
    made = Run.create(folder, changed(presets.get("debug").config, {"seed": seed, **fields}), b"tokenizer")
    made.record_environment({"backend": "cuda", "data": data})
    rows = [{"step": s, "train/loss": 3.0, "clock/seconds": 0.5 * s, "perf/tok_s": 1.0} for s in range(1, lines + 1)]
    if bpb is not None:
        rows.append({"step": lines, "samples": ['he said "train/loss": 5', "She"]})
        rows.append({"step": lines, "final/score": whole_score(9.0) | score})
        rows.append({"step": lines, "final/artifact": {"score": whole_score(bpb) | score, "bytes": 1000 + seed}})
    made.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def save(made: Run, step: int) -> None:
    """Give a run a checkpoint of a step, of which the header alone is right."""
    state = {"schema": 3, "step": step, "dtype": "float32", "quantise": False, "seconds": 1.0, "sha256": ""}
    write_tensors(made.checkpoint_path, {"param/x": np.zeros(3, np.float32)}, {"skc": json.dumps(state)})


def store(folder: Path) -> Runs:
    """Make a store with one ablation, `rates`, of four finished runs."""
    plan, made = read(folder.parent, PLAN), Runs(folder)
    places = [made.place(job) for job in plan.jobs()]
    made.train(places)
    made.store.write_members(plan, places)
    return made
