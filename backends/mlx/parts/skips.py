"""U-net skips: what the first half of the layers put out is added again in the second half."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.parts import Part


class Skips(Part):
    """Push what a layer put out, or add what was pushed last. Letters: B rows, T positions, D width."""

    def __init__(self, config, exact):
        super().__init__()
        self._exact, self._gates = exact, config.skips.gates
        self.weight = mx.zeros((config.skips.count(config), config.dim))
        if self._gates:
            self.gate = mx.zeros_like(self.weight)

    def __call__(self, stream, context, stage, state):
        if stage.row < 0:
            return stream._replace(skips=(*stream.skips, stream.x)), None
        # Last in, first out: the middle layers are nearest to each other.
        *skips, last_BTD = stream.skips
        x_BTD, added_BTD = stream.x, self.weight[stage.row].astype(last_BTD.dtype) * last_BTD
        if self._gates:
            share_D = ops.sigmoid(self.gate[stage.row], self._exact).astype(x_BTD.dtype)
            x_BTD, added_BTD = share_D * x_BTD, (1 - share_D) * added_BTD
        return stream._replace(x=x_BTD + added_BTD, skips=tuple(skips)), None
