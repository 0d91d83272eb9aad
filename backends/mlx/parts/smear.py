"""Smear: every token's embedding knows a little of the token before (docs/model.md)."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.parts import Part


class Smear(Part):
    """Mix a learned share of the previous token's embedding into every token's.

    Letters: B rows, T positions, D width.
    """

    def __init__(self, config, exact):
        super().__init__()
        self._exact = exact
        self.share = mx.zeros((config.dim,))

    def __call__(self, stream, context, stage, state):
        x_BTD = stream.x
        last_B1D = mx.zeros_like(x_BTD[:, :1]) if state is None else state
        rows_BXD = mx.concatenate([last_B1D, x_BTD], axis=1)
        share_D = ops.sigmoid(self.share, self._exact).astype(x_BTD.dtype)
        y_BTD = x_BTD + share_D * mx.where(context.continues[..., None], rows_BXD[:, :-1], 0.0)
        return stream._replace(x=y_BTD, embedded=y_BTD), rows_BXD

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        # The tape begins with the state's own row: at n it has the last that is kept.
        return ops.pick(tape, n_B)[:, None]
