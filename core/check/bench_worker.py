"""One variant of `skc bench` in a process of its own: `python -m core.check.bench_worker`; not for people."""

import importlib
import json
import os
import subprocess
import sys
import time
from typing import IO

from core import PYTHON, rng
from core.config import RunConfig, from_json, to_json
from core.data.batch import Batch
from core.engine.measured import load_measured
from core.engine.protocol import EngineOptions
from core.engine.ranks import Alone, Ranks
from core.training import schedule

VARIANTS = {
    "cuda": ("cuda", True),
    "cuda-compiled": ("cuda", True),
    "mlx": ("mlx", True),
    "mlx-reference-blas": ("mlx", False),
}
"""Name -> (backend, fast BLAS)."""
RANKS = 8
"""GPUs of a node: one rank's share of a step is what one of them can be timed by."""


class BenchError(ArithmeticError):
    """A measurement could not be made."""


def rank_of(world: int, backend: str) -> Ranks:
    """Return rank 0 of `world` without the other ranks: it does its part of an update, and nothing is sent."""
    if world == 1:
        return Alone()
    return importlib.import_module(f"backends.{backend}.distributed").OneOf(world)


class Worker:
    """The process of one variant, which answers each line on its input with one JSON line."""

    def __init__(self, variant: str, config: RunConfig, threads: int, ranks: int):
        count_of = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        command = [*PYTHON, "-m", "core.check.bench_worker", variant, json.dumps(to_json(config)), str(ranks)]
        self.variant = variant
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **count_of}
        )

    def ask(self, line: str) -> dict:
        """Send a line and wait for the answer; BenchError if the process died."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(line + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass
        answer = stdout.readline()
        if not answer:
            raise BenchError(f"the process of {self.variant} ended with code {self.process.wait()}; see above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def serve(variant: str, config: RunConfig, ranks: int, lines: IO[str]) -> None:
    """Answer the parent's lines: build and warm up, run steps, time updates, report statistics."""
    backend, fast_blas = VARIANTS[variant]
    compiled = True if variant == "cuda-compiled" else None
    options = EngineOptions(fast_blas=fast_blas, compile=compiled)
    if backend == "mlx" and fast_blas:  # before anything imports MLX
        importlib.import_module("backends.mlx.blas").load_fast_blas()
    engine = load_measured(backend, config, options=options, ranks=rank_of(ranks, backend))
    shape = (config.train.batch // ranks, config.train.seq + 1)
    flat = rng.integers16(config.seed, "bench", shape[0] * shape[1]).astype("int32") % config.model.vocab
    rows = flat.reshape(shape)
    batch, plan = Batch(rows[:, :-1], rows[:, 1:], config.train.batch), schedule.plan(0, 0.5, config.train)
    for line in lines:
        if line.startswith("ready"):
            engine.train_step(batch, plan).result()  # compiles
            start = time.perf_counter()
            engine.train_step(batch, plan).result()
            took = time.perf_counter() - start
            forward = f"forward pass: {'stored' if engine.quantise else 'float'} weights"
            notes = (*engine.notes, forward)
            answer: dict = {"device": engine.device, "dtype": engine.dtype, "notes": notes, "step": took}
        elif line.startswith("steps"):
            size, peak = engine.matmul_rate()
            steps, start, cpu = int(line.split()[1]), time.perf_counter(), time.process_time()
            pending = [engine.train_step(batch, plan) for _ in range(steps)]
            pending[-1].result()
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            answer = {
                "seconds": took,
                "cpu": cpu,
                "steps": steps,
                "peak": peak,
                "peak_size": size,
                "stats": engine.stats(),
            }
        elif line.startswith("updates"):
            answer = {"seconds": engine.update_seconds(plan, int(line.split()[1]))}
        else:
            answer = engine.stats()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], from_json(RunConfig, json.loads(sys.argv[2])), int(sys.argv[3]), sys.stdin)
