"""How long the runs of an ablation take, by `skc train --dry-run` of one of each kind."""

import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from core.ablation.plan import Job
from core.console import Console
from core.engine.loading import choose_backend
from core.training.environment import ROOT
from core.verbs.common import Context
from core.verbs.train import Train, train_run


def time_runs(jobs: Sequence[Job], say: Console) -> dict[tuple[str, str], float]:
    """Return (variant, backend) -> seconds that each of `jobs` takes from the start of its process to its report."""
    starts = {backend: _start_of(backend) for backend in sorted({job.backend for job in jobs})}
    return {(job.variant, job.backend): starts[job.backend] + _run_of(job, say) for job in jobs}


def _start_of(backend: str) -> float:
    """Return the seconds that a worker takes before it begins to build; this process has what it imports then."""
    code = f"import core.verbs.ablation_worker, backends.{backend}.engine"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    took = time.perf_counter() - began
    choose_backend(backend)
    if backend == "mlx":  # before anything imports MLX
        importlib.import_module("backends.mlx.blas").load_fast_blas()
    importlib.import_module(f"backends.{backend}.engine")
    return took


def _run_of(job: Job, say: Console) -> float:
    """Return the seconds that a run takes from its start to its report."""
    say(f"timing {job.variant} on {job.backend}")
    quiet = Console()
    quiet.mute()
    options = replace(Train.of(job.config), backend=job.backend, dtype=job.dtype, dry_run=True)
    return train_run(options, Context(quiet, "")).value["total"]
