"""A stand-in for core.verbs.ablation_worker: it trains nothing. `python -m shared_tests.support.ablation_worker FOLDER`

It makes a real run folder, step by step, with a checkpoint counter, and notes every step it takes in FOLDER/taken.txt,
so that a test can see that no step is lost and none is taken twice. Seed 13 fails, and seed 99 is killed once.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from core.config import RunConfig, from_json
from core.files import replace_file
from core.training.run import Run
from core.verbs.ablation_worker import take_orders

STEPS = 10


def whole_score(bpb: float) -> dict[str, Any]:
    """Return what a run records of a score."""
    return {
        "label": "score", "bpb": bpb, "byte_rule": "table", "nats": 9000.0, "targets": 5000, "bytes": 12_000,
        "loss": 1.8, "documents": 9, "total_documents": 9, "full": True, "error": None, "bpb_raw": None,
        "windows": "plain seq=64 stride=64", "plugins": [],
    }  # fmt: skip


def main() -> int:
    """Take the steps of one run, and end."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(75)), daemon=True).start()
    return take(Path(sys.argv[1]))


def take(folder: Path) -> int:
    """Take the steps that are left."""
    (folder / "pid.txt").write_text(str(os.getpid()))
    job = json.loads((folder / "job.json").read_text())
    config = from_json(RunConfig, job["config"])
    run = Run.create(folder / "run", config, b"tokenizer")
    if config.seed == 13:
        print("Traceback ...\nskc train: the loss (nan) is not finite")
        return 1
    if config.seed == 99 and not (folder / "taken.txt").exists():
        (folder / "taken.txt").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    counter = run.path / "state" / "steps"
    done = int(counter.read_text()) if counter.exists() else 0
    for step in range(done, STEPS):
        time.sleep(float(os.environ.get("SKC_TEST_STEP", "0.02")))
        with open(folder / "taken.txt", "a") as file:
            file.write(f"{step}\n")
        replace_file(counter, str(step + 1).encode())
        run.log(step + 1, {"train/loss": 3.0, "train/bpb": 2.0, "clock/seconds": 0.1 * (step + 1)})
    bpb = 2.0 - config.model.dim / 1000 + config.seed / 10_000
    run.log(STEPS, {"final/artifact": {"score": whole_score(bpb), "bytes": 1000 + config.model.dim}})
    return 0


if __name__ == "__main__":
    sys.exit(take_orders(take))
