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
    C of all heads together, S positions of the state and T."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact, settings = config, exact, config.attention
        width, whole = settings.width(config), settings.whole(config)
        kv = settings.kv_heads * width
        self.q = Linear(config.dim, whole)
        self.k = Linear(config.dim, kv)
        self.v = Linear(config.dim, kv)
        self.o = Output(whole, config, exact)
        if settings.conv:
            self.conv = nn.Parameter(torch.zeros(config.dim, TAPS))
        if config.norm_gains:
            self.q_norm_gain = nn.Parameter(torch.zeros(width))
            self.k_norm_gain = nn.Parameter(torch.zeros(width))
        else:
            self.q_gain = nn.Parameter(torch.zeros(settings.heads))
        self._exclusive = tuple(i for i in range(config.layers) if settings.excludes(config, i))
        if settings.output_gate:
            self.gate = Linear(config.dim, whole)
        if settings.head_gate != "none":
            self.head_gate = nn.Parameter(torch.zeros(settings.heads, settings.head_gate_width))

    def forward(self, stream, context, stage, state):
        config, exact, x_BTD, settings = self._config, self._exact, stream.x, self._config.attention
        rows, seq, dim = x_BTD.shape
        tail_BPD, gained = None, config.norm_gains
        if settings.conv:
            zeros_BPD = torch.zeros((rows, TAPS - 1, dim), dtype=x_BTD.dtype, device=x_BTD.device)
            tail_BPD = torch.cat([zeros_BPD if state is None else state.tail, x_BTD], dim=1)
            x_BTD = ops.short_conv(tail_BPD, self.conv, context.history)
        split = (rows, seq, -1, settings.width(config))
        q_BHTK = torch.swapaxes(self.q(x_BTD).reshape(split), 1, 2)
        k_BGTK = torch.swapaxes(self.k(x_BTD).reshape(split), 1, 2)
        v_BTC = self.v(x_BTD)
        if stage.layer in stream.to_values:
            v_BTC = v_BTC + stream.to_values[stage.layer]
        own_BTGK = v_BTC.reshape(split)
        v_BGTK = torch.swapaxes(own_BTGK, 1, 2)
        # Normalised queries and keys bound the scores; the gain learns how sharp they get.
        q_BHTK = ops.rms_norm(q_BHTK, config.norm_eps, exact, 1 + self.q_norm_gain if gained else None)
        k_BGTK = ops.rms_norm(k_BGTK, config.norm_eps, exact, 1 + self.k_norm_gain if gained else None)
        q_BHTK, k_BGTK = (ops.rope(x, context.cos, context.sin) for x in (q_BHTK, k_BGTK))
        if not gained:
            q_BHTK = q_BHTK * self.q_gain.to(q_BHTK.dtype)[:, None, None]
        # Keys are kept as they were rotated: scores depend on distances alone.
        if state is not None:
            k_BGTK, v_BGTK = torch.cat([state.k, k_BGTK], dim=2), torch.cat([state.v, v_BGTK], dim=2)
        y_BHTK = context.attend(q_BHTK, k_BGTK, v_BGTK, context.mask, exact)  # CUDA: the form chosen at build
        y_BTHK = torch.swapaxes(y_BHTK, 1, 2)
        if stage.layer in self._exclusive:
            y_BTHK = ops.exclude(y_BTHK, own_BTGK, context.alone, settings.xsa == "projected")
        if settings.head_gate != "none":
            y_BTHK = self.factors(stream.x)[..., None] * y_BTHK
        y_BTC = y_BTHK.reshape(rows, seq, -1)
        if settings.output_gate:
            y_BTC = ops.sigmoid(self.gate(stream.x), exact) * y_BTC
        y_BTD = self.o(y_BTC)
        return stream._replace(x=y_BTD), AttentionState(k_BGTK, v_BGTK, tail_BPD)

    def factors(self, x_BTD):
        """Return the factor of every head, by the first channels of what entered the layer."""
        settings = self._config.attention
        weight_HD, rest = self.head_gate * settings.head_gate_scale, x_BTD.shape[-1] - settings.head_gate_width
        if rest:  # zeros for the channels that it does not read: a slice's gradient would be written into zeros instead
            weight_HD = torch.nn.functional.pad(weight_HD, (0, rest))
        gate_BTH = ops.sigmoid(ops.linear(x_BTD, weight_HD), self._exact)
        return 2 * gate_BTH if settings.head_gate == "double" else gate_BTH

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk: of its keys those in kept.keys."""
        kept = context.kept
        k_BGSK, v_BGSK = (torch.swapaxes(ops.pick(torch.swapaxes(x, 1, 2), kept.keys), 1, 2) for x in (tape.k, tape.v))
        tail_BPD = None if tape.tail is None else ops.tail(tape.tail, *kept.tail, empty=0.0)
        return AttentionState(k_BGSK, v_BGSK, tail_BPD)
