"""How long a training step of the MLX engine takes in each compute type: which is fast depends on the chip."""

import dataclasses
import time
from typing import Any

import numpy as np

from core import presets, rng
from core.config import NO_STAGES, RunConfig, changed
from core.data.batch import Batch
from core.engine.loading import load_engine
from core.engine.protocol import DType, EngineOptions
from core.model.params import param_table
from core.training import schedule

TYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
ROUNDS = 5


def step_milliseconds(gpu: bool) -> dict[str, float]:
    """Return the time of a training step by compute type, the best of five that were measured in turns.

    On a GPU two layers of the preset baseline at full width, 2 rows of 1,024 tokens; on a CPU `debug`, 2 of 64.
    """
    config = _sized(gpu)
    random, table = np.random.default_rng(0), param_table(config.model)
    weights = {name: 0.02 * random.standard_normal(row.shape, np.float32) for name, row in table.items()}
    shape = (config.train.batch, config.train.seq + 1)
    tokens = rng.integers16(0, "types", shape[0] * shape[1]).astype(np.int32).reshape(shape) % config.model.vocab
    batch, plan = Batch(tokens[:, :-1], tokens[:, 1:], shape[0]), schedule.plan(0, 0.5, config.train)
    engines: dict[str, Any] = {
        dtype: load_engine("mlx", config, weights, EngineOptions(dtype=dtype, compile=None if gpu else False))
        for dtype in TYPES
    }
    for engine in engines.values():
        engine.train_step(batch, plan).result()  # compiles
    times: dict[str, list[float]] = {dtype: [] for dtype in TYPES}
    for _ in range(ROUNDS):
        for dtype, engine in engines.items():
            start = time.perf_counter()
            engine.train_step(batch, plan).result()
            times[dtype].append(1000 * (time.perf_counter() - start))
    return {dtype: min(each) for dtype, each in times.items()}


def speeds_in_words(times: dict[str, float], taken: str) -> str:
    """Return which type was faster, and what to do where the engine takes another one."""
    figures = ", ".join(f"{dtype} {value:.1f} ms" for dtype, value in times.items())
    fastest = min(times, key=lambda dtype: times[dtype])
    advice = "" if fastest == taken else f"; skc train takes {taken}: --dtype {fastest} may be faster"
    return f"a training step in {figures}: {fastest} was fastest{advice}"


def _sized(gpu: bool) -> RunConfig:
    config = presets.get("baseline" if gpu else "debug").config
    sizes: dict[str, Any] = {"batch": 2, "micro_batch": None, "seq": 1024 if gpu else 64, **NO_STAGES}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **sizes))
    return dataclasses.replace(config, model=changed(config.model, {"layers": 2})) if gpu else config
