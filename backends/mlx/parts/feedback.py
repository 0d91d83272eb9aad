"""Feedback: what a repeat of layers is given is corrected by what the pass before it put out."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.linear import Linear
from backends.mlx.parts import Part


class Feedback(Part):
    """Begin a repeat where its layers began, corrected. Letters: B rows, T positions, D width, F of what is read."""

    def __init__(self, config, exact):
        super().__init__()
        self._eps, self._exact = config.norm_eps, exact
        self.pool = Linear(config.dim, config.feedback.width)
        self.scale = Linear(config.feedback.width, config.dim)
        self.shift = Linear(config.feedback.width, config.dim)

    def read(self, x_BTD):
        """Return what corrects a token, (B, T, F): made of what the pass before put out at the token itself."""
        return self.pool(ops.rms_norm(x_BTD, self._eps, self._exact))

    def __call__(self, stream, context, stage, state):
        z_BTF = self.read(stream.x)
        x_BTD = stream.entered * (1 + mx.tanh(self.scale(z_BTF))) + self.shift(z_BTF)
        return stream._replace(x=x_BTD), None
