"""The embedding: a vector per token, which the tied head reads too."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.linear import Matrix


class Embedding(Matrix):
    """Give every token a vector."""

    def __init__(self, vocab, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab, width))

    def forward(self, tokens_BT):
        return ops.embedding(tokens_BT, self.weight)
