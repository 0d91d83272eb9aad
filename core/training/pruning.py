"""Which rows of EngramHash survive model.engram.keep: those that the training text reads most before the first step."""

import math

import numpy as np

from core.config import ModelConfig, RunConfig
from core.data.dataset import Split
from core.model.ngrams import ngram_buckets
from core.model.params import start_values

COUNTED = 1 << 24
"""Tokens of a training text whose n-grams decide which rows are kept."""
PIECE = 1 << 20
"""Tokens that are hashed at once when a whole text is."""


def keep_rows(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Return which rows of `engram.table` stay under model.engram.keep, (tables * buckets,) bool.

    Every table keeps the share of its order, rounded up: the rows that n-grams of the training text `tokens` (N,)
    int read most; ties go to the lower index. Without engram.keep all rows stay, and the text is not looked at.
    """
    orders, heads, buckets = config.engram.orders, config.engram.heads, config.engram.buckets
    keep = np.ones(orders * heads * buckets, bool)
    if not config.engram.keep:
        return keep
    keep[:] = False
    hits = _hits(config, tokens)
    for table in range(orders * heads):
        # A share is a decimal number: 0.07 of 100 is 7 rows, though its double is a little over.
        count = math.ceil(config.engram.keep[table // heads] * buckets - 1e-9)
        first = table * buckets
        keep[first + np.argsort(-hits[first : first + buckets], kind="stable")[:count]] = True
    return keep


def _hits(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Return how many n-grams of a text read each row of `engram.table`."""
    multipliers, buckets = config.engram.multipliers, config.engram.buckets
    hits = np.zeros(sum(map(len, multipliers)) * buckets, np.int64)
    history = np.full(config.engram.orders, -1, np.int64)
    for start in range(0, len(tokens), PIECE):
        ids = np.concatenate([history, tokens[start : start + PIECE]])[None]
        documents = np.cumsum((ids == config.bos) & (config.documents == "isolated"), axis=1)
        rows = ngram_buckets(ids, documents, multipliers, buckets)
        hits += np.bincount(rows[rows >= 0], minlength=len(hits))
        history = ids[0, -config.engram.orders :]
    return hits


def start_weights(config: RunConfig, train: Split) -> dict[str, np.ndarray]:
    """Return the weights that a run starts from: the start values, pruned by the first COUNTED tokens of its text."""
    weights = start_values(config.model, config.seed)
    if not config.model.engram.keep:
        return weights
    return prune(config.model, weights, train.read(0, min(len(train), COUNTED)))


def prune(config: ModelConfig, weights: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the weights with the rows of `engram.table` that `keep_rows` drops set to zero.

    A changed array is a copy; without engram.keep none is changed.
    """
    if not config.engram.keep:
        return dict(weights)
    table = weights["engram.table"]
    return weights | {"engram.table": np.where(keep_rows(config, tokens)[:, None], table, np.zeros_like(table))}
