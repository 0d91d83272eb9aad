"""Measures on this machine what the parts of a run cost; weights and optimizer are spoilt, nothing is written."""

import contextlib
import hashlib
import math
import os
import socket
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from core.config import RunConfig, TrainConfig
from core.data.dataset import Dataset
from core.decoding.generate import samples
from core.engine.memory import is_memory
from core.engine.protocol import Engine
from core.engine.ranks import Ranks, agree
from core.export import codecs
from core.forecast.forecast import Costs, Passes, StepKind
from core.model.params import param_table
from core.scoring.evaluation import Evaluation
from core.scoring.score import rank_alone, score
from core.training.loop import Clock, agreed, prefetch, warm_up
from core.training.schedule import plan, progress_by_steps

STEPS, SECONDS = 10, 3.0
"""Of the kind of step that a run has most of, so many are timed, and more of short ones, for about so long."""
FEWER = 0.4
"""Share of that for every other kind."""
MOST = 200
"""Steps that are timed at most."""
PASSES = 4
"""Forward passes of scoring that are timed."""
GRID = 10_000
"""Shares of a run at which the schedule is asked for kinds of steps, where time decides."""


class MemoryExceededError(ArithmeticError):
    """The probe needed more memory than there is."""


def probe(engine: Engine, dataset: Dataset, config: RunConfig, say: Callable[[str], None]) -> Costs:
    """Time steps of every kind, passes of every scoring, and what else a run does; on all ranks together.

    MemoryExceededError if the machine has too little memory for it.
    """
    try:
        return _probe(engine, dataset, config, say)
    except (MemoryError, RuntimeError) as error:
        if is_memory(error):
            raise MemoryExceededError(
                f"this run needs more memory than there is ({error}): use a smaller --train.micro-batch"
            ) from error
        raise


def _probe(engine: Engine, dataset: Dataset, config: RunConfig, say: Callable[[str], None]) -> Costs:
    ranks = engine.ranks
    say("compiling")
    warming = _timed(ranks, lambda: warm_up(engine, config))
    steps, ahead = {}, 0
    for kind, share in (counts := kinds(config.train)).most_common():
        say(f"timing steps, {kind.describe(config)}: {share / counts.total():.0%} of the run")
        steps[kind], lead = _time_steps(engine, dataset, config, kind, FEWER if steps else 1.0)
        ahead = max(ahead, lead)
    say("timing forward passes of scoring, samples, a checkpoint and the export")
    scoring = _time_scoring(engine, dataset, config, config.eval.documents, False)
    estimate = _time_scoring(engine, dataset, config, config.eval.train_documents, False)
    timed = config.eval.plugins and config.eval.adapt.kind == "none"  # passes of adaptation grow with the documents
    plugins = _time_scoring(engine, dataset, config, config.eval.documents, True) if timed else None
    first = ranks.rank == 0
    writing = _timed(ranks, lambda: samples(engine, dataset.tokenizer, config) if first else None)
    size = 0

    def checkpoint() -> None:
        nonlocal size
        params, state = engine.params(), engine.optimizer()
        if first:
            arrays = {f"param/{n}": v for n, v in params.items()} | {f"optim/{n}": v for n, v in state.items()}
            data = safetensors.numpy.save(arrays)
            hashlib.sha256(data)
            size = len(data)

    saving = _timed(ranks, checkpoint)
    exporting = _timed(ranks, lambda: _export(engine, config) if first else None)
    memory = measure_memory(engine)
    return Costs(
        steps=steps,
        ahead=ahead,
        warm_up=warming,
        estimate=estimate,
        scoring=scoring,
        plugins=plugins,
        samples=writing,
        checkpoint=saving,
        checkpoint_bytes=agree(ranks, size),
        export=exporting,
        memory=memory.used,
        memory_of=memory.of,
        memory_limit=memory.limit,
    )


def kinds(settings: TrainConfig) -> Counter[StepKind]:
    """Return every kind of step of a run, with how often it comes (of GRID, where time decides)."""
    if settings.seconds is None:
        shares = [progress_by_steps(step, settings) for step in range(settings.steps)]
    else:
        shares = [i / GRID for i in range(GRID)]
    return Counter(StepKind.of(plan(step, progress, settings)) for step, progress in enumerate(shares))


def _time_steps(engine: Engine, dataset: Dataset, config: RunConfig, kind: StepKind, part: float) -> tuple[float, int]:
    """Return the seconds of a step, data included, and how many steps the host was ahead at the end."""
    settings, ranks = config.train, engine.ranks
    now = replace(plan(0, 0.0, settings), **kind._asdict())
    feed, size = prefetch(config, ranks, dataset, 0, kind.rows, kind.seq), kind.rows * kind.seq
    try:
        first = _timed(ranks, lambda: engine.train_step(feed.get(0, kind.rows, kind.seq), now).result())
        wanted = max(STEPS, SECONDS / first) if first else STEPS
        clock, pending = Clock(), None
        for step in range(1, 1 + math.ceil(part * min(wanted, MOST))):
            agreed(clock, engine, settings)
            pending = engine.train_step(feed.get(step * size, kind.rows, kind.seq), now)
        issued = clock.seconds
        assert pending is not None
        pending.result()
        took = clock.seconds
    finally:
        feed.close()
    each = _slowest(ranks, took / step)
    return each, agree(ranks, round((took - issued) / each))


class _EnoughError(Exception):
    """As many forward passes were made as are timed."""


def _time_scoring(engine: Engine, dataset: Dataset, config: RunConfig, documents: int | None, plugins: bool) -> Passes:
    """Time the first passes of a scoring, which every rank makes for itself; with plug-ins, rank 0 alone."""
    ranks = engine.ranks

    def begin(limit: int) -> list[tuple[float, int, int]]:
        marks, clock = [], Clock()

        def mark(done: int, total: int) -> None:
            marks.append((clock.seconds, done, total))
            if len(marks) == limit:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            score(engine, Evaluation.of(dataset.val, config, documents, plugins), progress=mark)
        marks[-1] = (clock.seconds, *marks[-1][1:])  # passes that were under way are done now
        return marks

    if plugins and ranks.rank:
        cold = marks = [(0.0, 1, 1)]
    elif plugins:
        cold, marks = rank_alone(engine, lambda: (begin(1), begin(PASSES)))
    else:
        cold, marks = begin(1), begin(PASSES)
    seconds, windows, total = marks[-1]
    later = len(marks) - 1
    passes = math.ceil(total * len(marks) / windows)  # with carry: about
    return Passes(
        count=math.ceil(agree(ranks, passes) / (1 if plugins else ranks.world)),
        first=_slowest(ranks, marks[0][0]),
        cold=_slowest(ranks, cold[0][0]),
        each=_slowest(ranks, (seconds - marks[0][0]) / later if later else 0.0),
    )


def _export(engine: Engine, config: RunConfig) -> None:
    """Make the payload of an artifact and read it again, in memory."""
    table = param_table(config.model)
    codecs.unpack(memoryview(codecs.pack(engine.quantised(), table)), table)


class Memory(NamedTuple):
    """Memory in use and its limit, in bytes."""

    used: float
    of: str
    limit: float


def measure_memory(engine: Engine) -> Memory:
    """Return the peak so far: of the fullest device, or of all processes together on the fullest machine."""
    stats = engine.stats()
    own = "limit_bytes" in stats
    used = stats.get("peak_bytes", stats.get("process_bytes", 0.0))
    limit = stats["limit_bytes"] if own else float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    rows = engine.ranks.gather(np.array([used, limit, zlib.crc32(socket.gethostname().encode())], np.float64))
    if own:
        used, limit, _ = max((row.tolist() for row in rows), key=lambda row: row[0] / row[1])
        return Memory(used, "fullest device", limit)
    machines: dict[float, list[float]] = {}
    for size, most, machine in (row.tolist() for row in rows):
        machines.setdefault(machine, [0.0, most])[0] += size
    used, limit = max(machines.values(), key=lambda pair: pair[0] / pair[1])
    return Memory(used, "machine (arrays)" if "peak_bytes" in stats else "machine (processes)", limit)


def _timed(ranks: Ranks, act: Callable[[], Any]) -> float:
    """Return the seconds that something took, on the slowest rank."""
    clock = Clock()
    act()
    return _slowest(ranks, clock.seconds)


def _slowest(ranks: Ranks, seconds: float) -> float:
    return max(float(row[0]) for row in ranks.gather(np.array([seconds])))
