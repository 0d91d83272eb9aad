"""Scaffolding: parameters that stand while a model is trained, and are in nothing that is scored or stored.

They are rows of a table, as the model's are: an engine trains them, a checkpoint holds them. No average follows them,
no quantiser sees them, and weights that come without them get their start values.
"""

import numpy as np

from core.config import ModelConfig, TrainConfig
from core.model.params import param_table
from core.model.table import Init, Param, Rows


def scaffolding(config: ModelConfig, train: TrainConfig) -> Rows:
    """Return what stands beside the model while it is trained, in the order of its names: the further heads.

    A head reads what the tied one reads, in a factored embedding what the projection down leaves. It is a product like
    a layer's matrix, which every token takes part in, so that the matrix group's rule suits it.
    """
    width = config.embedding.dim or config.dim
    head = Param((config.vocab, width), Init("constant", 0.0), "matrix", scaffold=True)
    return {f"mtp.{ahead}.weight": head for ahead in range(1, train.mtp_heads + 1)}


def trained_table(config: ModelConfig, train: TrainConfig) -> Rows:
    """Return the model's table and the scaffolding behind it: all that an engine of a run trains."""
    return param_table(config) | scaffolding(config, train)


def standing(config: ModelConfig, train: TrainConfig) -> str:
    """Return what is said of it behind a number of parameters: nothing where there is none."""
    size = sum(row.size for row in scaffolding(config, train).values())
    return f" (+{size:,} while training)" if size else ""


def completed(config: ModelConfig, train: TrainConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights with the scaffolding's start values, if they have none of it: a fresh model's, an artifact's."""
    rows = scaffolding(config, train)
    if rows.keys() & weights.keys():
        return weights
    return weights | {name: np.full(row.shape, row.init.scale, np.float32) for name, row in rows.items()}
