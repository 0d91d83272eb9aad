"""The smallest models around one part, and what every part that reads the token before must keep."""

import dataclasses
from typing import Any

import numpy as np

from core import presets
from core.check.tolerances import CAUSAL, P2_FLOAT64, relative_rms
from core.config import ModelConfig, RunConfig, changed
from core.engine.protocol import step
from shared_tests import oracle
from shared_tests.support.harness import reader, tokens, working_weights

ONE_LAYER: dict[str, Any] = {
    "vocab": 29, "dim": 16, "layers": 1, "attention.heads": 2, "attention.kv_heads": 1, "attention.rope_dims": 4,
    "mlp.hidden": 20,
}  # fmt: skip


def run_of(settings: dict[str, Any]) -> RunConfig:
    """Return a run of the model that has these settings, and defaults beside them."""
    config = presets.mini(presets.get("debug").config)
    return dataclasses.replace(config, model=changed(ModelConfig(), settings))


def check_reading_back(settings: dict[str, Any], name: str, backend: str) -> None:
    """AssertionError unless a model equals the oracle, keeps documents apart, sees no future, and decodes alike."""
    config, rows = run_of(settings), tokens(name, 2, 23, 29, 1, documents=False)
    rows[:, [9, 15]] = config.model.bos
    model, weights = reader(backend, config, 5.0, dtype="float64"), working_weights(config.model, 5.0)
    whole = model.logits(rows)
    assert relative_rms(whole, oracle.model(config.model, weights, rows)) <= P2_FLOAT64
    other = rows.copy()
    other[:, 8] = (rows[:, 8] + 3) % 27 + 2
    effect = np.abs(model.logits(other) - whole).max(axis=(0, 2)) > 0
    packed = config.model.documents == "packed"
    assert not effect[:8].any() and effect[8] and effect[9:].any() == packed
    assert np.abs(model.logits(rows[:, :13]) - whole[:, :13]).max() <= CAUSAL
    state = model.start(len(rows))
    for t in range(rows.shape[1]):
        logits, state = step(model, state, rows[:, t])
        assert np.abs(logits - whole[:, t]).max() <= CAUSAL, t
