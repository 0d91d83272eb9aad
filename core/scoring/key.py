"""What names an evaluation: a ledger of another one is not gone on with."""

import hashlib
import json

import numpy as np

from core.config import RunConfig, chosen, to_json
from core.data.dataset import Dataset, identity
from core.engine.protocol import Engine

LEARNING = ("plugins", "round", "adapt", "phases")
"""Settings that decide an evaluation's numbers where something learns, and only there."""


def evaluation_key(engine: Engine, dataset: Dataset, config: RunConfig, plugins: bool) -> str:
    """Return what names an evaluation: the sha256 of weights, text, and the settings that decide its numbers.

    `plugins`: whether plug-ins and adaptation have a part in it.
    """
    weights = hashlib.sha256()
    for values in engine.weights().values():
        weights.update(np.ascontiguousarray(values, np.float32).data)
    settings = to_json(config.eval)
    free = ("train_documents",) if plugins else ("train_documents", "batch", *LEARNING)
    value = {
        "weights": weights.hexdigest(),
        "data": identity(dataset),
        "model": chosen(config.model),
        "eval": {name: setting for name, setting in settings.items() if name not in free},
        "engine": [engine.backend, engine.dtype],
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
