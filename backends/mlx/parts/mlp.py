"""The MLP of a layer."""

from backends.mlx import ops
from backends.mlx.linear import Linear, Output
from backends.mlx.parts import Part

ACTIVATIONS = {"relu2": ops.relu2, "leaky_relu2": ops.leaky_relu2}


class MLP(Part):
    """Change every position by itself: down(activation(up(x)))."""

    def __init__(self, config, exact, hidden=None):
        super().__init__()
        self._activation, self._exact = ACTIVATIONS[config.mlp.activation], exact
        hidden = hidden or config.mlp.hidden
        self.up = Linear(config.dim, hidden)
        self.down = Output(hidden, config, exact)

    def __call__(self, stream, context, stage, state):
        return stream._replace(x=self.down(self._activation(self.up(stream.x), self._exact))), None
