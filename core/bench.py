"""`skc bench PRESET`: training speed as a share of the machine's own matmul peak, measured in the same run.

Every variant lives in a process of its own (a BLAS and a thread count are chosen per process); the rounds interleave,
so that a noisy machine disturbs all variants alike. `python -m core.bench` is the worker; it is not for people.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from core.config import ConfigError, RunConfig, from_json, to_json
from core.engine import EngineOptions, available_backends
from core.params import FLOP_RULE, count, flops_per_token

VARIANTS = {
    "cuda": ("cuda", True),
    "cuda-compiled": ("cuda", True),
    "mlx": ("mlx", True),
    "mlx-reference-blas": ("mlx", False),
}
"""Name -> (backend, fast BLAS)."""
PEAK_SIZE = 1024


class BenchError(ArithmeticError):
    """A measurement could not be made."""


@dataclass(frozen=True)
class BenchRow:
    """One variant's medians over the rounds."""

    variant: str
    device: str
    dtype: str
    ms_per_step: float
    spread: tuple[float, float]
    """Fastest and slowest round, in ms per step."""
    tokens_per_second: float
    flops: float
    """Achieved model FLOP/s."""
    own_peak: float
    """FLOP/s of the variant's own matmul in the same run."""
    share: float
    """Achieved FLOP/s over `reference_peak` of the report."""
    peak_bytes: float
    peak_of: str
    """What peak_bytes counts: `arrays` of the framework, or the whole `process` where only that can be known."""
    traces: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BenchReport:
    """What `run_bench` measured."""

    preset: str
    parameters: int
    batch: int
    seq: int
    vocab: int
    threads: int
    rounds: int
    seconds: float
    """Time that one round of one variant takes at least; a slow variant runs one step."""
    flops_per_token: int
    flop_rule: str
    reference: str
    reference_peak: float
    rows: tuple[BenchRow, ...]

    def to_json(self) -> dict:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the table as text."""
        out = [
            f"{self.preset}: {self.parameters:,} parameters, B={self.batch} T={self.seq} V={self.vocab}, "
            f"{self.threads} thread(s), medians of {self.rounds} interleaved rounds of {self.seconds:g} s",
            f"{self.flops_per_token / 1e6:.2f} MFLOP/token; {self.flop_rule}",
            f"peak: ({PEAK_SIZE}, {PEAK_SIZE}) matmul of {self.reference}, {self.reference_peak / 1e9:.1f} GFLOP/s",
            "",
            f"{'variant':<20} {'ms/step':>9} {'fastest..slowest':>18} {'tokens/s':>10} {'GFLOP/s':>9} {'of peak':>8} "
            f"{'own peak':>9} {'memory':>9} {'traces':>6}",
        ]
        for r in self.rows:
            spread = f"{r.spread[0]:.0f}..{r.spread[1]:.0f}"
            out.append(
                f"{r.variant:<20} {r.ms_per_step:>9.1f} {spread:>18} {r.tokens_per_second:>10,.0f} "
                f"{r.flops / 1e9:>9.1f} {r.share:>8.1%} {r.own_peak / 1e9:>9.1f} "
                f"{r.peak_bytes / 2**20:>6.0f}MiB {r.traces:>6.0f}"
            )
        for r in self.rows:
            out.append(f"{r.variant}: {r.device}, {r.dtype}; memory of the {r.peak_of}; " + "; ".join(r.notes))
        return out


def default_variants() -> list[str]:
    """Return the variants that this machine can run: the reference-BLAS control only where MLX needs a BLAS loaded."""
    found = available_backends()
    names = ["cuda"] if "cuda" in found else []
    if "mlx" in found:
        names += ["mlx", "mlx-reference-blas"] if sys.platform == "linux" else ["mlx"]
    return names


def run_bench(
    config: RunConfig,
    *,
    variants: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 5.0,
    threads: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> BenchReport:
    """Time training steps of `config` on every variant; ConfigError for an unknown or missing variant."""
    names = variants or default_variants()
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"bench: variant {name!r} does not exist; known: {', '.join(VARIANTS)}")
        if VARIANTS[name][0] not in available_backends():
            raise ConfigError(f"bench: variant {name!r} needs a backend that is not installed; see: skc doctor")
    if not names:
        raise ConfigError("bench: no backend is installed; pip install -e '.[mlx]' or '.[torch]'")
    if min(rounds, threads) < 1 or seconds <= 0:
        raise ConfigError(
            f"bench: rounds={rounds}, threads={threads}, seconds={seconds}: expected at least 1, 1 and above 0"
        )
    workers = {name: _Worker(name, config, threads) for name in names}
    try:
        ready = {}
        for name, worker in workers.items():
            report(f"{name}: building, compiling and warming up")
            ready[name] = worker.ask("ready")
        times: dict[str, list[float]] = {name: [] for name in names}
        peaks: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            for name, worker in workers.items():
                report(f"round {turn + 1}/{rounds}: {name}")
                answer = worker.ask(f"steps {max(1, math.ceil(seconds / ready[name]['step']))}")
                times[name].append(answer["seconds"] / answer["steps"])
                peaks[name].append(answer["peak"])
        stats = {name: worker.ask("stats") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    reference = "cuda" if "cuda" in names else names[0]
    top = max(peaks[reference])
    tokens, work = config.train.tokens_per_step, flops_per_token(config.model, config.train.seq)
    rows = []
    for name in names:
        middle = statistics.median(times[name])
        rows.append(
            BenchRow(
                variant=name,
                device=ready[name]["device"],
                dtype=ready[name]["dtype"],
                ms_per_step=1e3 * middle,
                spread=(1e3 * min(times[name]), 1e3 * max(times[name])),
                tokens_per_second=tokens / middle,
                flops=work * tokens / middle,
                own_peak=max(peaks[name]),
                share=work * tokens / middle / top,
                peak_bytes=stats[name].get("peak_bytes", stats[name].get("process_bytes", 0.0)),
                peak_of="arrays" if "peak_bytes" in stats[name] else "process",
                traces=stats[name]["traces"],
                notes=tuple(ready[name]["notes"]),
            )
        )
    m, t = config.model, config.train
    return BenchReport(
        config.preset,
        count(m),
        t.batch,
        t.seq,
        m.vocab,
        threads,
        rounds,
        seconds,
        work,
        FLOP_RULE,
        reference,
        top,
        tuple(rows),
    )


class _Worker:
    """One variant in a process of its own, which answers each line on its input with one JSON line."""

    def __init__(self, variant: str, config: RunConfig, threads: int):
        count_of = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        command = [sys.executable, "-m", "core.bench", variant, json.dumps(to_json(config))]
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
            raise BenchError(f"bench: the process of {self.variant} ended with code {self.process.wait()}; see above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _serve(variant: str, config: RunConfig, lines: IO[str]) -> None:
    """Answer the parent's lines: build and warm up, run steps, report statistics."""
    from core import rng, schedule
    from core.engine import Batch, load_engine

    backend, fast_blas = VARIANTS[variant]
    compiled = True if variant == "cuda-compiled" else None
    engine = load_engine(backend, config, options=EngineOptions(fast_blas=fast_blas, compile=compiled))
    shape = (config.train.batch, config.train.seq + 1)
    flat = rng.integers16(config.seed, "bench", shape[0] * shape[1]).astype("int32") % config.model.vocab
    rows = flat.reshape(shape)
    batch, plan = Batch(rows[:, :-1], rows[:, 1:]), schedule.plan(0, 0.5, config.train)
    for line in lines:
        if line.startswith("ready"):
            engine.train_step(batch, plan).result()  # compiles
            start = time.perf_counter()
            engine.train_step(batch, plan).result()
            took = time.perf_counter() - start
            answer: dict = {"device": engine.device, "dtype": engine.dtype, "notes": engine.notes, "step": took}
        elif line.startswith("steps"):
            peak = engine.matmul_rate(PEAK_SIZE, 5)
            steps, start = int(line.split()[1]), time.perf_counter()
            pending = [engine.train_step(batch, plan) for _ in range(steps)]
            pending[-1].result()
            answer = {"seconds": time.perf_counter() - start, "steps": steps, "peak": peak}
        else:
            answer = engine.stats()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], from_json(RunConfig, json.loads(sys.argv[2])), sys.stdin)
