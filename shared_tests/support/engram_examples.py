"""Small models with EngramHash and their weights."""

from typing import Any

import numpy as np

from core.config import changed
from core.model.config import ModelConfig
from core.model.params import param_table
from shared_tests.support.harness import draw


def config(changes: dict[str, Any] | None = None) -> ModelConfig:
    """Return a tiny model with all memories."""
    small: dict[str, Any] = {
        "vocab": 24, "dim": 8, "layers": 2, "attention.heads": 2, "attention.kv_heads": 1, "attention.rope_dims": 4,
        "mlp.hidden": 12,
        "engram.orders": 3, "engram.heads": 2, "engram.buckets": 31, "engram.dim": 12, "bigram.buckets": 29,
        "bigram.dim": 4, "smear.on": True, "bank.at": "both", "bank.heads": 2, "bank.capsules": 3, "skc.block": 4,
    }  # fmt: skip
    return changed(ModelConfig(), small | (changes or {}))


def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    return {name: 0.5 * draw(name, *row.shape) for name, row in param_table(model).items()}
