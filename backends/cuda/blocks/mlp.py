"""The MLP that follows every mixer."""

import torch.nn as nn

from backends.cuda import ops
from backends.cuda.blocks.linear import Linear, Output

ACTIVATIONS = {"relu2": ops.relu2, "leaky_relu2": ops.leaky_relu2}


class MLP(nn.Module):
    """y = down(activation(up(x)))."""

    def __init__(self, config, exact):
        super().__init__()
        self._activation, self._exact = ACTIVATIONS[config.mlp.activation], exact
        self.up = Linear(config.dim, config.mlp.hidden)
        self.down = Output(config.mlp.hidden, config, exact)

    def forward(self, x_BTD):
        return self.down(self._activation(self.up(x_BTD), self._exact))
