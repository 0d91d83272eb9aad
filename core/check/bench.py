"""`skc bench PRESET`: training speed as a share of the machine's own matmul peak, measured in the same run.

Every variant of every preset lives in a process of its own (a BLAS and a thread count are chosen per process); the
rounds interleave, so that a noisy machine disturbs all alike, and what is compared is compared within a round.
`python -m core.check.bench` is the worker; it is not for people.
"""

import dataclasses
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

from core import PYTHON
from core.config import ConfigError, RunConfig, differences, from_json, to_json
from core.engine.protocol import EngineOptions, available_backends
from core.engine.ranks import Alone, Ranks
from core.model.params import FLOP_RULE, count, flops_per_token

VARIANTS = {
    "cuda": ("cuda", True),
    "cuda-compiled": ("cuda", True),
    "mlx": ("mlx", True),
    "mlx-reference-blas": ("mlx", False),
}
"""Name -> (backend, fast BLAS)."""
MOST = 1024
"""Rounds and threads."""
RANKS = 8
"""GPUs of a node: one rank's share of a step is what one of them can be timed by."""
UPDATES = 3
"""Optimizer updates that are timed in a round."""


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
    update_ms: float
    """The optimizer update alone: clip, rules, averages, finiteness guard."""
    update_share: float
    """Median over the rounds of the update's share of a step of the same round."""
    update_spread: tuple[float, float]
    """Smallest and largest of these shares."""
    flops: float
    """Achieved model FLOP/s."""
    own_peak: float
    """FLOP/s of the variant's own large matmul in the same run."""
    peak_size: int
    """Rows and columns of that matmul."""
    share: float
    """Achieved FLOP/s over `reference_peak` of the report."""
    peak_bytes: float
    peak_of: str
    """What peak_bytes counts: `arrays` of the framework, or the whole `process` where only that can be known."""
    traces: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PresetBench:
    """What was measured of one preset."""

    preset: str
    parameters: int
    batch: int
    seq: int
    vocab: int
    flops_per_token: int
    rows: tuple[BenchRow, ...]

    def lines(self) -> list[str]:
        """Return the table as text."""
        out = [
            f"{self.preset}: {self.parameters:,} parameters, B={self.batch} T={self.seq} V={self.vocab}, "
            f"{self.flops_per_token / 1e6:.2f} MFLOP/token",
            f"{'variant':<18} {'ms/step':>8} {'fastest..slowest':>16} {'tokens/s':>9} {'update':>9} {'of step':>7} "
            f"{'GFLOP/s':>8} {'of peak':>7} {'own peak':>8} {'memory':>8} {'traces':>6}",
        ]
        for r in self.rows:
            spread = f"{r.spread[0]:.0f}..{r.spread[1]:.0f}"
            out.append(
                f"{r.variant:<18} {r.ms_per_step:>8.1f} {spread:>16} {r.tokens_per_second:>9,.0f} "
                f"{r.update_ms:>7.1f}ms {r.update_share:>7.1%} {r.flops / 1e9:>8.1f} {r.share:>7.1%} "
                f"{r.own_peak / 1e9:>8.1f} {r.peak_bytes / 2**20:>5.0f}MiB {r.traces:>6.0f}"
            )
        for r in self.rows:
            low, high = r.update_spread
            out.append(
                f"{r.variant}: {r.device}, {r.dtype}; memory of the {r.peak_of}; update {low:.1%} to {high:.1%} of "
                "a step; " + "; ".join(r.notes)
            )
        return out


@dataclass(frozen=True)
class Ratio:
    """Time per step of a preset over another's, on one variant."""

    variant: str
    median: float
    """Median over the rounds; a round's ratio is that of two neighbours in time."""
    spread: tuple[float, float]
    """Smallest and largest ratio of a round."""
    cpu_median: float
    """The same of the processors' time, which other jobs on the machine disturb less; on a GPU: the host's work."""
    cpu_spread: tuple[float, float]


@dataclass(frozen=True)
class Against:
    """The other preset of a comparison, trained on as many rows and tokens a step."""

    other: PresetBench
    changed: tuple[str, ...]
    """Settings of the other preset that were replaced by the preset's, one line each."""
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class BenchReport(PresetBench):
    """What `run_bench` measured: of one preset, and of another one beside it."""

    threads: int
    rounds: int
    seconds: float
    """Time that one round of one variant takes at least; a slow variant runs one step."""
    flop_rule: str
    reference: str
    reference_peak: float
    ranks: int
    """Of so many ranks one was timed: its rows, its part of the update, nothing sent. 1: a whole step."""
    against: Against | None

    def to_json(self) -> dict:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the tables as text."""
        size = next(row.peak_size for row in self.rows if row.variant == self.reference)
        out = [
            f"{self.threads} thread(s), medians of {self.rounds} interleaved rounds of {self.seconds:g} s",
            *([f"one rank of {self.ranks}: its rows and its part of the update, nothing is sent"] * (self.ranks > 1)),
            f"peak: ({size}, {size}) matmul of {self.reference}, {self.reference_peak / 1e9:.1f} GFLOP/s",
            "",
            *super().lines(),
        ]
        if self.against is None:
            return out
        other = self.against.other
        out += ["", *other.lines()]
        out += [f"{other.preset} was changed for this comparison: {line}" for line in self.against.changed]
        out.append("")
        for r in self.against.ratios:
            wall, cpu = (f"(rounds {low:.3f} to {high:.3f})" for low, high in (r.spread, r.cpu_spread))
            out.append(
                f"{r.variant}: a step of {self.preset} takes {r.median:.3f} times that of {other.preset} {wall}; "
                f"of processor time {r.cpu_median:.3f} times {cpu}"
            )
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
    against: RunConfig | None = None,
    variants: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 5.0,
    threads: int = 1,
    ranks: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> BenchReport:
    """Time training steps of `config` on every variant; ConfigError for an unknown or missing variant.

    `against`: another run to time in the same rounds, with the batch of `config` (see `same_work`). `ranks`: time what
    one of so many does of a step (see `rank_of`).
    """
    names = list(dict.fromkeys(variants or default_variants()))
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"bench: variant {name!r} does not exist; known: {', '.join(VARIANTS)}")
        if VARIANTS[name][0] not in available_backends():
            raise ConfigError(f"bench: variant {name!r} needs a backend that is not installed; see: skc doctor")
    if not names:
        raise ConfigError("bench: no backend is installed; pip install -e '.[mlx]' or '.[torch]'")
    if min(rounds, threads) < 1 or max(rounds, threads) > MOST or not 0 < seconds < math.inf:
        raise ConfigError(
            f"bench: rounds={rounds}, threads={threads}, seconds={seconds}: expected 1 to {MOST:,} of each and above 0"
        )
    if ranks < 1 or config.train.batch % ranks:
        raise ConfigError(f"bench: ranks={ranks}: expected a divisor of train.batch={config.train.batch}")
    configs = [config] if against is None else [config, same_work(against, config)]
    timed = _measure(configs, names, rounds, seconds, threads, ranks, report)
    reference = "cuda" if "cuda" in names else names[0]
    top = max(peak for tasks in timed for peak in tasks[reference].peaks)
    first, *others = (_table(c, t, top, ranks) for c, t in zip(configs, timed, strict=True))
    compared = None
    if against is not None:
        ratios = []
        for name in names:
            a, b = timed[0][name], timed[1][name]
            wall, cpu = (middle_and_spread(per_round(*pair)) for pair in ((a.steps, b.steps), (a.cpu, b.cpu)))
            ratios.append(Ratio(name, *wall, *cpu))
        compared = Against(others[0], tuple(differences(against, configs[1])), tuple(ratios))
    return BenchReport(
        **{f.name: getattr(first, f.name) for f in dataclasses.fields(first)},
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        flop_rule=FLOP_RULE,
        reference=reference,
        reference_peak=top,
        ranks=ranks,
        against=compared,
    )


def same_work(other: RunConfig, config: RunConfig) -> RunConfig:
    """Return `other` with the rows, tokens per row and micro-batches of `config`, so that their steps compare."""
    t = config.train
    shape = {"batch": t.batch, "seq": t.seq, "micro_batch": t.micro_batch, "seq_stages": (), "seq_until": ()}
    return dataclasses.replace(other, train=dataclasses.replace(other.train, **shape))


def rank_of(world: int, backend: str) -> Ranks:
    """Return rank 0 of `world` without the others: it takes its part of an update, and what it sends goes nowhere."""
    if world == 1:
        return Alone()
    return importlib.import_module(f"backends.{backend}.distributed").OneOf(world)


def per_round(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the ratio of two times in every round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def middle_and_spread(values: list[float]) -> tuple[float, tuple[float, float]]:
    """Return the median, and (smallest, largest)."""
    return statistics.median(values), (min(values), max(values))


@dataclass
class _Timed:
    """What a worker measured: seconds by round, and what it said of itself."""

    ready: dict
    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    peak_size: int = 0
    memory: dict = field(default_factory=dict)
    """Statistics after the first steps: before an update was timed, which holds weights and optimizer state twice."""
    traces: float = 0.0


def _measure(
    configs: list[RunConfig],
    names: list[str],
    rounds: int,
    seconds: float,
    threads: int,
    ranks: int,
    report: Callable[[str], None],
) -> list[dict[str, _Timed]]:
    """Return what was measured of every variant, by name, for every config."""
    workers: dict[tuple[int, str], _Worker] = {}
    try:
        for name in names:  # variant by variant, so that what is compared runs side by side
            for i, config in enumerate(configs):
                workers[i, name] = _Worker(name, config, threads, ranks)
        timed = {}
        for (i, name), worker in workers.items():
            report(f"{configs[i].preset}, {name}: building, compiling and warming up")
            timed[i, name] = _Timed(worker.ask("ready"))
        for turn in range(rounds):
            order = list(workers) if turn % 2 == 0 else list(reversed(workers))  # a drift of the machine cancels
            for key in order:
                report(f"round {turn + 1}/{rounds}: {configs[key[0]].preset}, {key[1]}")
                worker, t = workers[key], timed[key]
                answer = worker.ask(f"steps {max(1, math.ceil(seconds / t.ready['step']))}")
                t.steps.append(answer["seconds"] / answer["steps"])
                t.cpu.append(answer["cpu"] / answer["steps"])
                t.peaks.append(answer["peak"])
                t.peak_size = answer["peak_size"]
                t.memory = t.memory or answer["stats"]
                t.updates.append(worker.ask(f"updates {UPDATES}")["seconds"])
        for key, worker in workers.items():
            timed[key].traces = worker.ask("stats")["traces"]
    finally:
        for worker in workers.values():
            worker.close()
    return [{name: timed[i, name] for name in names} for i in range(len(configs))]


def _table(config: RunConfig, timed: dict[str, _Timed], top: float, ranks: int) -> PresetBench:
    """Return the rows of one preset; `top` is the FLOP/s that shares are of."""
    m, t = config.model, config.train
    work = flops_per_token(m, t.seq)
    rows = []
    for name, found in timed.items():
        middle, spread = middle_and_spread([1e3 * step for step in found.steps])
        share, share_spread = middle_and_spread(per_round(found.updates, found.steps))
        speed = t.tokens_per_step / ranks / middle * 1e3
        rows.append(
            BenchRow(
                variant=name,
                device=found.ready["device"],
                dtype=found.ready["dtype"],
                ms_per_step=middle,
                spread=spread,
                tokens_per_second=speed,
                update_ms=1e3 * statistics.median(found.updates),
                update_share=share,
                update_spread=share_spread,
                flops=work * speed,
                own_peak=max(found.peaks),
                peak_size=found.peak_size,
                share=work * speed / top,
                peak_bytes=found.memory.get("peak_bytes", found.memory.get("process_bytes", 0.0)),
                peak_of="arrays" if "peak_bytes" in found.memory else "process",
                traces=found.traces,
                notes=tuple(found.ready["notes"]),
            )
        )
    return PresetBench(config.preset, count(m), t.batch // ranks, t.seq, m.vocab, work, tuple(rows))


class _Worker:
    """One variant in a process of its own, which answers each line on its input with one JSON line."""

    def __init__(self, variant: str, config: RunConfig, threads: int, ranks: int):
        count_of = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        command = [*PYTHON, "-m", "core.check.bench", variant, json.dumps(to_json(config)), str(ranks)]
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


def _serve(variant: str, config: RunConfig, ranks: int, lines: IO[str]) -> None:
    """Answer the parent's lines: build and warm up, run steps, time updates, report statistics."""
    from core import rng
    from core.data.batch import Batch
    from core.engine.protocol import load_engine
    from core.training import schedule

    backend, fast_blas = VARIANTS[variant]
    compiled = True if variant == "cuda-compiled" else None
    options = EngineOptions(fast_blas=fast_blas, compile=compiled)
    if backend == "mlx" and fast_blas:  # before anything imports MLX
        importlib.import_module("backends.mlx.blas").load_fast_blas()
    engine = load_engine(backend, config, options=options, ranks=rank_of(ranks, backend))
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
    _serve(sys.argv[1], from_json(RunConfig, json.loads(sys.argv[2])), int(sys.argv[3]), sys.stdin)
