"""The bank: a store of token vectors, each under the routing of the token before it (docs/model.md)."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.linear import Linear
from backends.mlx.parts import Part
from backends.mlx.parts.capsules import Capsules


class Bank(Part):
    """Read what followed contexts like this one. Letters: B rows, T positions, D width, R routing logits."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        routes = config.bank.heads * config.bank.capsules
        self.route = Linear(config.dim, routes)
        self.write_bias = mx.zeros((routes,))
        self.capsules = Capsules(config.bank.store(config), config.norm_eps, exact)
        self.gate = mx.zeros((config.dim,))

    def __call__(self, stream, context, stage, state):
        f_BTD = ops.rms_norm(stream.x, self._config.norm_eps, self._exact)
        kind, route_BTR = f_BTD.dtype, self.route(f_BTD)  # one router: what was written under is what is asked for
        write_BTR = route_BTR + self.write_bias.astype(kind)
        # The tokens' own vectors: the tied head turns what is read into logits of these tokens.
        y_BTD, tape, losses = self.capsules(write_BTR, route_BTR, stream.values, context, state)
        y_BTD = self.gate.astype(kind) * ops.rms_norm(y_BTD, self._config.norm_eps, self._exact).astype(kind)
        # In front of the head the stream is normalised, so that the gate weighs the same whatever its size has become.
        x_BTD = (f_BTD if stage.name == "bank_head" else stream.x) + y_BTD
        return stream._replace(x=x_BTD, auxiliary=stream.auxiliary + losses), tape

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        return self.capsules.commit(tape, context, n_B)
