"""`skc bench PRESET`: training speed as a share of the machine's own matmul peak, measured in the same run.

Every variant of every preset lives in a process of its own (a BLAS and a thread count are chosen per process); the
rounds interleave, so that a noisy machine disturbs all alike, and what is compared is compared within a round.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from core.check.bench_report import Against, BenchReport, BenchRow, PresetBench, Ratio
from core.check.bench_worker import VARIANTS, Worker
from core.config import NO_STAGES, ConfigError, RunConfig, differences
from core.engine.loading import available_backends
from core.model.params import count
from core.model.shares import FLOP_RULE, flops_per_token

MOST = 1024
"""Rounds and threads."""
UPDATES = 3
"""Optimizer updates that are timed in a round."""


def default_variants() -> list[str]:
    """Return the variants that this machine can run; mlx-reference-blas only where MLX needs a fast BLAS loaded."""
    backends = available_backends()
    names = ["cuda"] if "cuda" in backends else []
    if "mlx" in backends:
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
    _check(names, rounds, seconds, threads)
    if ranks < 1 or config.train.batch % ranks:
        raise ConfigError(f"ranks={ranks}: expected a divisor of train.batch={config.train.batch}")
    configs = [config] if against is None else [config, same_work(against, config)]
    timed = _measure(configs, names, rounds, seconds, threads, ranks, report)
    reference = "cuda" if "cuda" in names else names[0]
    top = max(peak for tasks in timed for peak in tasks[reference].peaks)
    first, *others = (_table(c, t, top, ranks) for c, t in zip(configs, timed, strict=True))
    return BenchReport(
        **{f.name: getattr(first, f.name) for f in dataclasses.fields(first)},
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        flop_rule=FLOP_RULE,
        reference=reference,
        reference_peak=top,
        ranks=ranks,
        against=None if against is None else _compare(against, others[0], configs[1], timed),
    )


def _check(names: list[str], rounds: int, seconds: float, threads: int) -> None:
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"variant {name!r} does not exist; known: {', '.join(VARIANTS)}")
        if VARIANTS[name][0] not in available_backends():
            raise ConfigError(f"variant {name!r} needs a backend that is not installed; see: skc doctor")
    if not names:
        raise ConfigError("no backend is installed; pip install -e '.[mlx]' or '.[torch]'")
    if min(rounds, threads) < 1 or max(rounds, threads) > MOST or not 0 < seconds < math.inf:
        raise ConfigError(
            f"rounds={rounds}, threads={threads}, seconds={seconds}: expected 1 to {MOST:,} of each and above 0"
        )


def same_work(other: RunConfig, config: RunConfig) -> RunConfig:
    """Return `other` with the rows, tokens per row and micro-batches of `config`, so that their steps compare."""
    t = config.train
    shape = {"batch": t.batch, "seq": t.seq, "micro_batch": t.micro_batch}
    return dataclasses.replace(other, train=dataclasses.replace(other.train, **shape, **NO_STAGES))


def per_round(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the ratio of two times in every round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def middle_and_spread(values: list[float]) -> tuple[float, tuple[float, float]]:
    """Return the median, and (smallest, largest)."""
    return statistics.median(values), (min(values), max(values))


@dataclass
class _Timed:
    """What a worker measured: seconds by round, and its description of itself."""

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
    workers: dict[tuple[int, str], Worker] = {}
    try:
        for name in names:  # variant by variant, so that what is compared runs side by side
            for i, config in enumerate(configs):
                workers[i, name] = Worker(name, config, threads, ranks)
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


def _compare(given: RunConfig, other: PresetBench, used: RunConfig, timed: list[dict[str, _Timed]]) -> Against:
    """Return the ratios of two presets' times; `used` is what was timed for `given`."""
    ratios = []
    for name, ours in timed[0].items():
        theirs = timed[1][name]
        wall, cpu = (
            middle_and_spread(per_round(*pair)) for pair in ((ours.steps, theirs.steps), (ours.cpu, theirs.cpu))
        )
        ratios.append(Ratio(name, *wall, *cpu))
    return Against(other, tuple(differences(given, used)), tuple(ratios))


def _table(config: RunConfig, timed: dict[str, _Timed], top: float, ranks: int) -> PresetBench:
    """Return the rows of one preset; `top` is the FLOP/s that shares are of."""
    m, t = config.model, config.train
    work = flops_per_token(m, t.seq)
    rows = []
    for name, times in timed.items():
        middle, spread = middle_and_spread([1e3 * step for step in times.steps])
        share, share_spread = middle_and_spread(per_round(times.updates, times.steps))
        speed = t.tokens_per_step / ranks / middle * 1e3
        rows.append(
            BenchRow(
                variant=name,
                device=times.ready["device"],
                dtype=times.ready["dtype"],
                ms_per_step=middle,
                spread=spread,
                tokens_per_second=speed,
                update_ms=1e3 * statistics.median(times.updates),
                update_share=share,
                update_spread=share_spread,
                flops=work * speed,
                own_peak=max(times.peaks),
                peak_size=times.peak_size,
                share=work * speed / top,
                peak_bytes=times.memory.get("peak_bytes", times.memory.get("process_bytes", 0.0)),
                peak_of="arrays" if "peak_bytes" in times.memory else "process",
                traces=times.traces,
                notes=tuple(times.ready["notes"]),
            )
        )
    return PresetBench(config.preset, count(m), t.batch // ranks, t.seq, m.vocab, work, tuple(rows))
