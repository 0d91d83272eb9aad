"""Layer kind `attention`: causal, grouped-query, with normalised queries and keys, a gain per head, partial RoPE."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.blocks.linear import Linear, Output


class Attention(nn.Module):
    """Mix positions by attention. Letters: B rows, T positions, D width, H heads, G key/value heads, K channels."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        kv = config.kv_heads * config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, kv)
        self.v = Linear(config.dim, kv)
        self.o = Output(config.dim, config, exact)
        self.q_gain = nn.Parameter(torch.zeros(config.heads))

    def forward(self, x_BTD, context):
        config, exact = self._config, self._exact
        rows, seq, dim = x_BTD.shape
        split = (rows, seq, -1, config.head_dim)
        q_BHTK = torch.swapaxes(self.q(x_BTD).reshape(split), 1, 2)
        k_BGTK = torch.swapaxes(self.k(x_BTD).reshape(split), 1, 2)
        v_BGTK = torch.swapaxes(self.v(x_BTD).reshape(split), 1, 2)
        q_BHTK = ops.rope(ops.rms_norm(q_BHTK, config.norm_eps, exact), context.cos, context.sin)
        k_BGTK = ops.rope(ops.rms_norm(k_BGTK, config.norm_eps, exact), context.cos, context.sin)
        q_BHTK = q_BHTK * self.q_gain.to(q_BHTK.dtype)[:, None, None]
        y_BHTK = ops.attention(q_BHTK, k_BGTK, v_BGTK, context.mask, exact)
        return self.o(torch.swapaxes(y_BHTK, 1, 2).reshape(rows, seq, dim))
