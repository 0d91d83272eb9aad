"""Hashed bigrams: a row of a table for every pair of tokens, added to the embedding (docs/model.md)."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.linear import Linear
from backends.mlx.parts import Part
from core.model.ngrams import BIGRAM_MULTIPLIER


class Bigram(Part):
    """Add a row of a hashed table of bigrams to every token's embedding. Letters: B rows, T positions, D width."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        self.table = mx.zeros((config.bigram.buckets, config.bigram.dim))
        self.value = Linear(config.bigram.dim, config.dim)
        if config.bigram.scale is not None:
            self.scale = mx.ones((1,))

    def __call__(self, stream, context, stage, state):
        (ids, documents), settings = context.last_ids(1), self._config.bigram
        if settings.hash == "xor":
            rows_BT1 = ops.xor_buckets(ids, documents, settings.buckets)
        else:
            rows_BT1 = ops.ngram_buckets(ids, documents, [(BIGRAM_MULTIPLIER,)], settings.buckets)
        added_BTD = self.value(ops.hashed_rows(self.table, rows_BT1).astype(stream.x.dtype))
        if settings.scale is not None:
            added_BTD = self.scale.astype(added_BTD.dtype) * added_BTD
        # The raw vectors, then one norm: the stream starts at the size that it has without the table.
        x_BTD = ops.rms_norm(stream.raw + added_BTD, self._config.norm_eps, self._exact)
        return stream._replace(x=x_BTD, embedded=x_BTD), None
