"""Layer kinds `skc` and `skc_parallel`: a Koopman mixer whose values are also stored in capsules and read from them."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.linear import Linear
from backends.mlx.parts.capsules import Capsules
from backends.mlx.parts.koopman import Koopman
from core.model.context import SKCState, SKCTape


class SKC(Koopman):
    """Mix positions by a recurrence and by capsules. Letters: B rows, T positions, D width, C mixer channels."""

    def __init__(self, config, exact):
        super().__init__(config, exact)
        routes = config.skc.heads * config.skc.capsules
        self.write = Linear(config.dim, routes)
        self.write_bias = mx.zeros((routes,))
        self.read = Linear(config.dim, routes)
        self.capsules = Capsules(config.skc.store(config), config.norm_eps, exact)
        self.capsule_gain = mx.zeros((config.koopman.dim,))

    def __call__(self, stream, context, stage, state):
        x_BTD, kind = stream.x, stream.x.dtype
        state = state or self.start(x_BTD, context)
        z_BTC, s_BTC, koopman = self.recur(x_BTD, context, state.koopman)
        write_BTR = self.write(x_BTD) + self.write_bias.astype(kind)
        # Behind the convolution: a capsule stores what a few tokens say, not one alone.
        y_BTC, capsules, losses = self.capsules(write_BTR, self.read(x_BTD), s_BTC, context, state.capsules)
        # The norm of nothing is nothing: in its first block a document reads no capsules.
        y_BTC = ops.rms_norm(y_BTC, self._config.norm_eps, self._exact, self.capsule_gain)
        z_BTC = z_BTC + y_BTC.astype(kind)
        stream = stream._replace(x=self.gated(x_BTD, z_BTC), auxiliary=stream.auxiliary + losses)
        return stream, SKCTape(koopman, capsules)

    def start(self, x_BTD, context):
        """Return the state before the first token."""
        return SKCState(super().start(x_BTD, context), None)

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        koopman = super().commit(tape.koopman, context, n_B)
        return SKCState(koopman, self.capsules.commit(tape.capsules, context, n_B))
