"""The weights that a run starts from."""

import numpy as np

from core.config import RunConfig
from core.data.dataset import Split
from core.model.ngrams import prune
from core.model.params import start_values

COUNTED = 1 << 24
"""Tokens of a training text whose n-grams decide which rows of the n-gram tables are kept."""


def start_weights(config: RunConfig, train: Split) -> dict[str, np.ndarray]:
    """Return the weights that a run starts from: the start values, pruned by the first COUNTED tokens of its text."""
    weights = start_values(config.model, config.seed)
    if not config.model.engram.keep:
        return weights
    return prune(config.model, weights, train.read(0, min(len(train), COUNTED)))
