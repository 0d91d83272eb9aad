"""EngramHash, token by token."""

from collections.abc import Sequence

import numpy as np

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Array, Stream, Text, Weights
from shared_tests.reference.ops import hashed_rows, linear, rms_norm, sigmoid

EXAMPLE = {"engram.orders": 3, "engram.heads": 2, "engram.buckets": 101, "engram.dim": 12}


def engram(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return x + gate * value of the memory, with a gate that compares x and the memory's key."""
    settings, x = config.engram, stream.x
    memory = hashed_rows(w["table"], ngrams(text, settings.multipliers, settings.buckets))
    key = rms_norm(linear(memory, w["key.weight"]), config.norm_eps, True)
    cosine = (rms_norm(x, config.norm_eps, True) * key).sum(-1, keepdims=True) / config.dim
    gate = sigmoid((0.1 + 3.9 * sigmoid(w["sharpness"], True)) * cosine + w["bias"], True)
    return stream._replace(x=x + gate * linear(memory, w["value.weight"]))


def ngrams(text: Text, multipliers: Sequence[Sequence[int]], buckets: int) -> Array:
    """Return the rows of the stacked tables that every token's n-grams read, (B, T, orders * heads), -1 where one would
    be longer than its document so far: the polynomial as it is written, in Python's unbounded integers.
    """
    out = np.full((*text.tokens.shape, sum(map(len, multipliers))), -1)
    for row, ids in enumerate(text.tokens.tolist()):
        document: list[int] = []
        for t, token in enumerate(ids):
            document = [token] if text.starts[row, t] else [*document, token]
            table = 0
            for order, heads in enumerate(multipliers, 1):
                for p in heads:
                    if len(document) > order:
                        hashed = sum(document[-1 - j] * p**j for j in range(order + 1)) % buckets
                        out[row, t, table] = table * buckets + hashed
                    table += 1
    return out
