"""Hashed n-grams: the multipliers, the rows that an n-gram reads, and which rows survive `model.engram.keep`.

The hash of the ids i_0 (oldest) .. i_n (newest) is sum_j i_j p^(n - j) mod buckets, by Horner's rule with p reduced
first. It cannot tell apart ids that are equal mod buckets, under any multiplier: buckets >= vocab avoids that.
"""

import math
from collections.abc import Sequence

import numpy as np

from core.model.config import ModelConfig
from core.model.engram import MOST_BUCKETS

MULTIPLIERS = (
    (314_159, 769_781, 1_085_353, 1_757_467),
    (343_727, 1_222_229, 1_697_257, 1_998_923),
    (221_083, 935_513, 1_574_341, 1_731_479),
)
"""[order][head]: bigrams, trigrams, 4-grams. shared_tests/model/test_engram.py says what they were chosen for."""
BIGRAM_MULTIPLIER = 1_998_257
"""The multiplier of the hashed bigrams that are added to the embedding."""
MOST_ID = 65_535
"""Largest token id that may be hashed."""
PIECE = 1 << 20
"""Tokens that are hashed at once when a whole text is."""


def ngram_buckets(
    ids: np.ndarray, documents: np.ndarray, multipliers: Sequence[Sequence[int]], buckets: int
) -> np.ndarray:
    """Return the rows of the stacked tables that the n-grams ending at each position read, -1 where one does not count.

    ids and documents (B, P + T) int begin with the P = orders positions before (id -1: there is none);
    multipliers[order][head] are those in use. Returns (B, T, orders * heads) int32: table t = order * heads + head owns
    rows t * buckets to (t + 1) * buckets - 1. An n-gram counts if every position of it holds an id >= 0 and is in the
    document of the newest. ValueError: shapes that do not fit, an id over MOST_ID, buckets outside 2 to MOST_BUCKETS.
    docs/model.md, engram; an n-gram that reaches over a document's edge counts as none.
    """
    before = len(multipliers)
    if ids.ndim != 2 or ids.shape != documents.shape or ids.shape[1] < before:
        raise ValueError(f"ids {ids.shape} and documents {documents.shape}: expected both (rows, {before} + tokens)")
    if not 2 <= buckets <= MOST_BUCKETS:
        raise ValueError(f"buckets={buckets}: expected from 2 to {MOST_BUCKETS}")
    if ids.size and ids.max() > MOST_ID:
        raise ValueError(f"token id {ids.max()}: expected at most {MOST_ID}")
    seq = ids.shape[1] - before
    safe, here, counts = np.maximum(ids, 0).astype(np.uint32), documents[:, before:], ids[:, before:] >= 0
    tables: list[np.ndarray] = []
    for order, heads in enumerate(multipliers, 1):
        oldest = slice(before - order, before - order + seq)
        counts = counts & (ids[:, oldest] >= 0) & (documents[:, oldest] == here)
        for multiplier in heads:
            # h and p are at most buckets - 1 <= 65,520 and an id is at most 65,535, so that h p + id is at most
            # 65,520^2 + 65,535 = 4,292,935,935 < 2^32 = 4,294,967,296: no uint32 ever wraps.
            p, h = np.uint32(multiplier % buckets), np.zeros(here.shape, np.uint32)
            for lag in range(order, -1, -1):
                h = (h * p + safe[:, before - lag : before - lag + seq]) % np.uint32(buckets)
            tables.append(np.where(counts, h.astype(np.int32) + len(tables) * buckets, -1).astype(np.int32))
    return np.stack(tables, -1)


def multipliers_of(config: ModelConfig) -> list[tuple[int, ...]]:
    """Return the multipliers of EngramHash that `config` uses, [order][head]."""
    return [heads[: config.engram.heads] for heads in MULTIPLIERS[: config.engram.orders]]


def keep_rows(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Return which rows of `engram.table` stay under model.engram.keep, (tables * buckets,) bool.

    Every table keeps the share of its order, rounded up: the rows that most n-grams of the training text `tokens` (N,)
    int read, of equals the first. Without engram.keep all rows stay, and the text is not looked at.
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
    multipliers, buckets = multipliers_of(config), config.engram.buckets
    hits = np.zeros(sum(map(len, multipliers)) * buckets, np.int64)
    history = np.full(config.engram.orders, -1, np.int64)
    for start in range(0, len(tokens), PIECE):
        ids = np.concatenate([history, tokens[start : start + PIECE]])[None]
        documents = np.cumsum((ids == config.bos) & (config.documents == "isolated"), axis=1)
        rows = ngram_buckets(ids, documents, multipliers, buckets)
        hits += np.bincount(rows[rows >= 0], minlength=len(hits))
        history = ids[0, -config.engram.orders :]
    return hits


def prune(config: ModelConfig, weights: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the weights with the rows of `engram.table` that `keep_rows` drops set to zero.

    A changed array is a copy; without engram.keep none is changed.
    """
    if not config.engram.keep:
        return dict(weights)
    table = weights["engram.table"]
    return weights | {"engram.table": np.where(keep_rows(config, tokens)[:, None], table, np.zeros_like(table))}
