"""Hashed bigrams, token by token."""

from core.config import ModelConfig
from core.model.ngrams import BIGRAM_MULTIPLIER
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights
from shared_tests.oracle.engram import ngrams
from shared_tests.reference.ops import hashed_rows, linear, rms_norm

EXAMPLE = {"bigram.buckets": 53, "bigram.dim": 6}


def bigram(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return the norm of the tokens' own vectors with a row of the table added to each."""
    rows = ngrams(text, [[BIGRAM_MULTIPLIER]], config.bigram.buckets)
    added = linear(hashed_rows(w["table"], rows), w["value.weight"])
    x = rms_norm(stream.raw + added, config.norm_eps, True)
    return stream._replace(x=x, embedded=x)
