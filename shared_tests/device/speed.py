"""How long a step of a full-size preset takes on one device, and where the time goes.

On a GPU it is the step of one rank of eight: 64 of the 512 rows and an eighth of Muon's matrices, without transfers.
"""

import dataclasses
import re
import time

import numpy as np

from core import presets, rng
from core.check.bench_worker import RANKS, rank_of
from core.config import RunConfig
from core.data.batch import Batch
from core.engine.measured import Measured, load_measured
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, Engine, EngineOptions
from core.model.params import param_table
from core.model.shares import flops_per_token
from core.training import schedule
from shared_tests.device.child import Child
from shared_tests.device.plan import SQUARE

ROUNDS, STEPS = 3, 10
DATA_SHEET = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s by the maker's data sheet, by what the device's name contains."""
ANNOTATIONS = re.compile("Torch-Compiled Region|## Call CompiledFxGraph|ProfilerStep|Optimizer\\.")
"""Spans that a profiler shows on a device although nothing runs in parts of them."""
TOP = 20
"""Kernels of the profile."""


def run(child: Child, preset: str, micro: int | None) -> None:
    """Compile a preset's step beside the other items, then time it."""
    config = sized(presets.get(preset).config, micro, child)
    compiles = child.backend == "cuda" and child.gpu
    if compiles:
        _load(child)
    began = time.monotonic()
    engine, batch = built(child, config)
    result = engine.train_step(batch, plan_of(config)).result()
    child.figure("build, compile and first step", time.monotonic() - began, "s")
    child.check("steps that are not finite", float(not result.finite), 0)
    if compiles:
        _keep(child)
    engine.train_step(batch, plan_of(config)).result()
    if child.backend == "cuda":
        if child.gpu:
            import torch

            torch.cuda.empty_cache()
        child.turn()
    for note in engine.notes:
        child.text("note", note)
    rows = len(batch.tokens)
    with child.alone():
        times = sorted(
            timed(engine, batch, config, STEPS if child.gpu else 2) for _ in range(ROUNDS if child.gpu else 1)
        )
        milliseconds = times[len(times) // 2]
        child.figure(
            f"step of {rows} x {config.train.seq} tokens, {config.train.rows} rows at a time", milliseconds, "ms"
        )
        child.text("fastest and slowest round", f"{times[0]:.2f} to {times[-1]:.2f} ms")
        speed = 1e3 * rows * config.train.seq / milliseconds
        child.figure("tokens a second", speed, "")
        achieved = speed * flops_per_token(config.model, config.train.seq)
        child.figure("model FLOP/s", achieved / 1e12, "TFLOP/s")
        sheet = next((value for name, value in DATA_SHEET.items() if name in engine.device), None)
        measured = child.earlier("ceilings", SQUARE)
        for what, ceiling in (("the data sheet", sheet), ("the measured product", measured and 1e12 * measured)):
            if ceiling:
                child.figure(f"share of {what}", 100 * achieved / ceiling, "%")
        for key, value in engine.stats().items():
            child.figure(key, value / 2**30 if key.endswith("bytes") else value, "GiB" if key.endswith("bytes") else "")
        if child.backend == "cuda":
            _profile(child, engine, batch, config, milliseconds)
        child.figure("update alone", 1e3 * engine.update_seconds(plan_of(config), 5 if child.gpu else 1), "ms")


def sized(config: RunConfig, micro: int | None, child: Child) -> RunConfig:
    """Return the run as a step of it is timed: as it is on a node, of 16 rows on a Mac, a mini without a GPU."""
    if not child.gpu:
        return presets.mini(config)
    sizes = {"micro_batch": micro} if child.backend == "cuda" else {"micro_batch": micro, "batch": 16}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **sizes))


def built(child: Child, config: RunConfig) -> tuple[Measured, Batch]:
    """Return an engine and its rows of one step."""
    ranks = rank_of((RANKS if child.gpu else 2) if child.backend == "cuda" else 1, child.backend)
    options = EngineOptions(compile=None if child.gpu else False)
    engine = load_measured(child.backend, config, drawn(config), options, ranks=ranks)
    rows, seq = config.train.batch // ranks.world, config.train.seq + 1
    tokens = rng.integers16(config.seed, "bench", rows * seq).astype("int32").reshape(rows, seq) % config.model.vocab
    return engine, Batch(tokens[:, :-1], tokens[:, 1:], config.train.batch)


def drawn(config: RunConfig) -> Arrays:
    """Return some weights: the run's own start values take 10 s longer, and a step takes the same with any."""
    random, table = np.random.default_rng(0), param_table(config.model)
    return {
        name: np.ones(row.shape, np.float32)
        if row.group == "vector"
        else 0.02 * random.standard_normal(row.shape, "f4")
        for name, row in table.items()
    }


def plan_of(config: RunConfig) -> StepPlan:
    """Return the plan of the step that is timed."""
    return schedule.plan(0, 0.5, config.train)


def timed(engine: Engine, batch: Batch, config: RunConfig, steps: int) -> float:
    """Return milliseconds a step."""
    start = time.perf_counter()
    pending = [engine.train_step(batch, plan_of(config)) for _ in range(steps)]
    pending[-1].result()
    return 1e3 * (time.perf_counter() - start) / steps


def _load(child: Child) -> None:
    """Take over what an earlier check on another machine compiled."""
    import torch

    file = child.temporary / f"{child.item.name}.compiled"
    if file.exists():
        with child.part("compiled code of an earlier check"):
            child.text(
                "compiled code of an earlier check", str(torch.compiler.load_cache_artifacts(file.read_bytes()))[:200]
            )


def _keep(child: Child) -> None:
    """Keep what was compiled for the next check on a bare machine."""
    import torch

    with child.part("compiled code"):
        kept = torch.compiler.save_cache_artifacts()
        if kept is not None:
            (child.temporary / f"{child.item.name}.compiled").write_bytes(kept[0])
            child.text("compiled code", f"{len(kept[0]):,} bytes")


def _profile(child: Child, engine: Engine, batch: Batch, config: RunConfig, milliseconds: float) -> None:
    """Write the kernels that two steps spend most time in, and how long the device has nothing to do."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if child.gpu else [])]
    with child.part("profile"):
        with profile(activities=activities) as found:
            timed(engine, batch, config, 2)
        kind, events = "CUDA" if child.gpu else "CPU", found.events() or ()
        kernels = (e for e in events if e.device_type.name == kind and not ANNOTATIONS.match(e.name))
        spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels)
        busy, until = 0.0, float("-inf")
        for begin, end, _ in spans:
            busy, until = busy + max(0.0, end - max(begin, until)), max(until, end)
        whole = until - spans[0][0]
        child.figure("device idle, while profiled", 100 * (1 - busy / whole), "% of two steps")
        child.figure("kernels a step", len(spans) / 2, "")
        totals: dict[str, list[float]] = {}
        for begin, end, name in spans:
            totals.setdefault(name, []).append(end - begin)
        top = sorted(totals.items(), key=lambda of: -sum(of[1]))[:TOP]
        lines = [
            f"{sum(t) / 2e3:8.3f} ms {sum(t) / busy:6.1%} {len(t) / 2:7.1f} calls  {name[:150]}" for name, t in top
        ]
        head = f"\n{child.item.name}: {milliseconds:.2f} ms a step; profiled {whole / 2e3:.2f}, busy {busy / 2e3:.2f}"
        text = "\n".join(lines)
        child.profile(f"{head}\n{text}\n")
        child.text(f"{TOP} kernels by time, of one step", text)
