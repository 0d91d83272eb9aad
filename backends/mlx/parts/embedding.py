"""The embedding: a vector per token, which the tied head reads too."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.linear import Matrix


class Embedding(Matrix):
    """Give every token a vector."""

    def __init__(self, vocab, width):
        super().__init__()
        self.weight = mx.zeros((vocab, width))

    def __call__(self, tokens_BT):
        return ops.embedding(tokens_BT, self.weight)
