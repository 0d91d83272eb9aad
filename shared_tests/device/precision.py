"""Training in bfloat16 against float32, on the same text and batches; and how far two runs of one seed are apart."""

import dataclasses
from pathlib import Path

import numpy as np

from core.config import RunConfig
from core.data.batch import Batch
from core.data.batches import batch as batch_at
from core.data.bundled import prepare_sample
from core.data.dataset import open_dataset
from core.engine.loading import load_engine
from core.engine.protocol import Arrays, DType, EngineOptions
from core.model.params import start_values
from core.presets import get
from core.training import schedule
from shared_tests.device.child import Child

STEPS = 50
PRESETS = ("ablate_float", "skc_ablate")
"""A float model, and one whose weights are stored as ternary and int6."""
SMOOTH = 10
"""Steps of a running mean: single steps of two runs part by chance."""


def run(child: Child) -> None:
    """Train three times each, eagerly, by steps."""
    folder = child.temporary / "sample"
    prepare_sample(str(folder))
    for name in PRESETS:
        config = get(name).config
        train = dataclasses.replace(config.train, steps=STEPS, seconds=None)
        if not child.gpu:
            train = dataclasses.replace(train, batch=1, seq=32, steps=2)
        config = dataclasses.replace(config, train=train)
        data = _batches(folder, config)
        with child.part(name):
            weights = start_values(config.model, config.seed)
            dtypes: tuple[DType, ...] = ("float32", "bfloat16", "bfloat16")
            wide, narrow, again = (_losses(child, config, weights, data, dtype) for dtype in dtypes)
            child.text(f"{name}: loss in float32", f"{wide[0]:.4f} to {wide[-1]:.4f} in {len(wide)} steps")
            child.figure(f"{name}: bfloat16 to float32, largest gap of smoothed losses", _gap(narrow, wide), "nats")
            child.figure(f"{name}: one seed twice, largest gap of losses", float(np.abs(narrow - again).max()), "nats")
            first = int(np.argmax(narrow != again)) if (narrow != again).any() else len(narrow)
            child.figure(f"{name}: one seed twice, steps with the same bits", first, "steps")


def _batches(folder: Path, config: RunConfig) -> list[Batch]:
    data, train = open_dataset(str(folder)).train, config.train
    return [batch_at(data, step, train.batch, train.seq, config.seed) for step in range(train.steps)]


def _losses(child: Child, config: RunConfig, weights: Arrays, data: list[Batch], dtype: DType) -> np.ndarray:
    made = load_engine(child.backend, config, weights, EngineOptions(dtype=dtype, compile=False))
    plans = (schedule.plan(s, schedule.progress_by_steps(s, config.train), config.train) for s in range(len(data)))
    pending = [made.train_step(batch, plan) for batch, plan in zip(data, plans, strict=True)]
    return np.array([p.result().loss for p in pending])


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    mean = np.ones(min(SMOOTH, len(a))) / min(SMOOTH, len(a))
    return float(np.abs(np.convolve(a - b, mean, "valid")).max())
