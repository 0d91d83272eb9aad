"""Hashed n-grams: the multipliers, and the rows that an n-gram reads.

The hash of the ids i_0 (oldest) .. i_n (newest) is sum_j i_j p^(n - j) mod buckets, by Horner's rule with p reduced
first. It cannot tell apart ids that are equal mod buckets, under any multiplier: buckets >= vocab avoids that.
"""

from collections.abc import Sequence

import numpy as np

MULTIPLIERS = (
    (314_159, 769_781, 1_085_353, 1_757_467),
    (343_727, 1_222_229, 1_697_257, 1_998_923),
    (221_083, 935_513, 1_574_341, 1_731_479),
)
"""[order][head]: bigrams, trigrams, 4-grams. shared_tests/model/test_engram.py says what they were chosen for."""
BIGRAM_MULTIPLIER = 1_998_257
"""The multiplier of the hashed bigrams that are added to the embedding."""
XOR_MULTIPLIERS = (36_313, 27_191)
"""What the newer and the older id of a pair are multiplied by under the hash xor, as the Parameter Golf records do."""
MOST_ID = 65_535
"""Largest token id that may be hashed."""
MOST_HASHES = 4
"""Hash functions that there are multipliers for, per n-gram order."""
MOST_BUCKETS = 65_521
"""Most buckets of a hashed table: the largest prime whose hashes stay below 2^32."""


def ngram_buckets(
    ids: np.ndarray, documents: np.ndarray, multipliers: Sequence[Sequence[int]], buckets: int
) -> np.ndarray:
    """Return the rows of the stacked tables that the n-grams ending at each position read, -1 where one does not count.

    ids and documents (B, P + T) int begin with the P = orders positions before (id -1: there is none);
    multipliers[order][head] are those in use. Returns (B, T, orders * heads) int32: table t = order * heads + head owns
    rows t * buckets to (t + 1) * buckets - 1. An n-gram counts if every position of it holds an id >= 0 and is in the
    document of the newest. ValueError: shapes that do not fit, an id over MOST_ID, buckets outside 2 to MOST_BUCKETS.
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
