"""The linear layer: a weight (out, in), no bias."""

import mlx.core as mx
import mlx.nn as nn

from backends.mlx import ops


class Linear(nn.Module):
    """y = x @ weight.T."""

    def __init__(self, into, out):
        super().__init__()
        self.weight = mx.zeros((out, into))

    def __call__(self, x):
        return ops.linear(x, self.weight)
