"""Smear, token by token."""

import numpy as np

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights
from shared_tests.reference.ops import sigmoid

EXAMPLE = {"smear.on": True, "smear.form": "window", "smear.width": 5}


def smear(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return every token with a share of the token before; nothing crosses the start of a document."""
    x, form = stream.x, config.smear.form
    out, previous = np.empty_like(x), np.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        previous[text.starts[:, t]] = 0
        if form == "window":
            share = w["scale"] * sigmoid(x[:, t, : config.smear.width] @ w["gate"], True)[:, None]
        else:
            share = sigmoid(w["share"], True)
        own = 1 - share if form == "lerp" else 1
        out[:, t] = own * x[:, t] + share * previous
        previous = x[:, t].copy()
    return stream._replace(x=out, embedded=out)
