"""Layer kind `attention`: causal, grouped-query, with normalised queries and keys, a gain per head, partial RoPE."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.linear import Linear, Output
from backends.cuda.parts import Part
from core.model.context import AttentionState
from core.model.table import TAPS


class Attention(Part):
    """Mix positions by attention. Letters: B rows, T positions, D width, H heads, G key/value heads, K channels,
    S positions of the state and T."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact, attention = config, exact, config.attention
        kv = attention.kv_heads * attention.width(config)
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, kv)
        self.v = Linear(config.dim, kv)
        self.o = Output(config.dim, config, exact)
        if attention.conv:
            self.conv = nn.Parameter(torch.zeros(config.dim, TAPS))
        self.q_gain = nn.Parameter(torch.zeros(attention.heads))

    def forward(self, stream, context, stage, state):
        config, exact, x_BTD = self._config, self._exact, stream.x
        rows, seq, dim = x_BTD.shape
        tail_BPD = None
        if config.attention.conv:
            zeros_BPD = torch.zeros((rows, TAPS - 1, dim), dtype=x_BTD.dtype, device=x_BTD.device)
            tail_BPD = torch.cat([zeros_BPD if state is None else state.tail, x_BTD], dim=1)
            x_BTD = ops.short_conv(tail_BPD, self.conv, context.history)
        split = (rows, seq, -1, config.attention.width(config))
        q_BHTK = torch.swapaxes(self.q(x_BTD).reshape(split), 1, 2)
        k_BGTK = torch.swapaxes(self.k(x_BTD).reshape(split), 1, 2)
        v_BTC = self.v(x_BTD)
        if stage.layer in stream.to_values:
            v_BTC = v_BTC + stream.to_values[stage.layer]
        v_BGTK = torch.swapaxes(v_BTC.reshape(split), 1, 2)
        # Normalised queries and keys bound the scores; the gain learns how sharp they get.
        q_BHTK = ops.rope(ops.rms_norm(q_BHTK, config.norm_eps, exact), context.cos, context.sin)
        k_BGTK = ops.rope(ops.rms_norm(k_BGTK, config.norm_eps, exact), context.cos, context.sin)
        q_BHTK = q_BHTK * self.q_gain.to(q_BHTK.dtype)[:, None, None]
        # Keys are kept as they were rotated: scores depend on distances alone.
        if state is not None:
            k_BGTK, v_BGTK = torch.cat([state.k, k_BGTK], dim=2), torch.cat([state.v, v_BGTK], dim=2)
        y_BHTK = context.attend(q_BHTK, k_BGTK, v_BGTK, context.mask, exact)  # CUDA: the form chosen at build
        y_BTD = self.o(torch.swapaxes(y_BHTK, 1, 2).reshape(rows, seq, dim))
        return stream._replace(x=y_BTD), AttentionState(k_BGTK, v_BGTK, tail_BPD)

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk: of its keys those in kept.keys."""
        kept = context.kept
        k_BGSK, v_BGSK = (torch.swapaxes(ops.pick(torch.swapaxes(x, 1, 2), kept.keys), 1, 2) for x in (tape.k, tape.v))
        tail_BPD = None if tape.tail is None else ops.tail(tape.tail, *kept.tail, empty=0.0)
        return AttentionState(k_BGSK, v_BGSK, tail_BPD)
