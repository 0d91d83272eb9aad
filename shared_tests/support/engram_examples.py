"""Small models with EngramHash and their weights."""

from typing import Any

import numpy as np

from core.model.config import ModelConfig
from core.model.params import param_table
from shared_tests.support.harness import draw


def config(**changes: Any) -> ModelConfig:
    """Return a tiny model with all memories."""
    small: dict[str, Any] = {
        "vocab": 24, "dim": 8, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_hidden": 12, "rope_dims": 4,
        "engram_orders": 3, "engram_heads": 2, "engram_buckets": 31, "engram_dim": 12, "bigram_buckets": 29,
        "bigram_dim": 4, "smear": True, "bank": "both", "bank_heads": 2, "bank_capsules": 3, "capsule_block": 4,
    }  # fmt: skip
    return ModelConfig(**small | changes)


def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    return {name: 0.5 * draw(name, *row.shape) for name, row in param_table(model).items()}
