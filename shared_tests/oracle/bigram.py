"""Hashed bigrams, token by token."""

import numpy as np

from core.config import ModelConfig
from core.model.ngrams import BIGRAM_MULTIPLIER
from core.model.trunk import Stage
from shared_tests.oracle import Array, Stream, Text, Weights
from shared_tests.oracle.engram import ngrams
from shared_tests.reference.ops import hashed_rows, linear, rms_norm

EXAMPLE = {"bigram.buckets": 53, "bigram.dim": 6, "bigram.hash": "xor", "bigram.scale": 0.3}


def bigram(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return the norm of the tokens' own vectors with a row of the table added to each."""
    settings = config.bigram
    rows = (
        xors(text, settings.buckets)
        if settings.hash == "xor"
        else ngrams(text, [[BIGRAM_MULTIPLIER]], settings.buckets)
    )
    added = linear(hashed_rows(w["table"], rows), w["value.weight"])
    added = added if settings.scale is None else w["scale"] * added
    x = rms_norm(stream.raw + added, config.norm_eps, True)
    return stream._replace(x=x, embedded=x)


def xors(text: Text, buckets: int) -> Array:
    """Return the row that every pair reads by the hash xor (B, T, 1): the last at the first token of a document."""
    out = np.full((*text.tokens.shape, 1), buckets - 1)
    for row, ids in enumerate(text.tokens.tolist()):
        for t in range(1, len(ids)):
            if not text.starts[row, t]:
                out[row, t] = (36_313 * ids[t] ^ 27_191 * ids[t - 1]) % (buckets - 1)
    return out
