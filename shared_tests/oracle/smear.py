"""Smear, token by token."""

import numpy as np

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights
from shared_tests.reference.ops import sigmoid

EXAMPLE = {"smear.on": True}


def smear(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return x_t + sigmoid(share) * x_{t-1}; nothing crosses the start of a document."""
    x, share = stream.x, sigmoid(w["share"], True)
    out, previous = np.empty_like(x), np.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        previous[text.starts[:, t]] = 0
        out[:, t] = x[:, t] + share * previous
        previous = x[:, t].copy()
    return stream._replace(x=out, embedded=out)
