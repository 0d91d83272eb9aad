"""The linear layers: a weight (out, in), no bias."""

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


class Output(Linear):
    """A projection back to the stream: its input may be normalised, without or with a gain per channel."""

    def __init__(self, into, config, exact):
        super().__init__(into, config.dim)
        self._norm, self._eps, self._exact = config.output_norm, config.norm_eps, exact
        if self._norm == "gain":
            self.gain = mx.zeros((into,))

    def __call__(self, x):
        x = ops.rms_norm(x, self._eps, self._exact) if self._norm != "none" else x
        return super().__call__(x * self.gain.astype(x.dtype) if self._norm == "gain" else x)
