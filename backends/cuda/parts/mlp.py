"""The MLP of a layer."""

from backends.cuda import ops
from backends.cuda.linear import Linear, Output
from backends.cuda.parts import Part

ACTIVATIONS = {"relu2": ops.relu2, "leaky_relu2": ops.leaky_relu2, "swiglu": ops.silu}


class MLP(Part):
    """Change every position by itself: down(activation(up(x))), or down(silu(gate(x)) * up(x))."""

    def __init__(self, config, exact, hidden=None):
        super().__init__()
        self._activation, self._exact = ACTIVATIONS[config.mlp.activation], exact
        hidden, self._gated = hidden or config.mlp.hidden, config.mlp.activation == "swiglu"
        if self._gated:
            self.gate = Linear(config.dim, hidden)
        self.up = Linear(config.dim, hidden)
        self.down = Output(hidden, config, exact)

    def forward(self, stream, context, stage, state):
        a_BTH = self._activation(self.gate(stream.x) if self._gated else self.up(stream.x), self._exact)
        a_BTH = a_BTH * self.up(stream.x) if self._gated else a_BTH
        return stream._replace(x=self.down(a_BTH)), None
