"""Layer kind `koopman`: a short convolution, then a diagonal recurrence over channels that a Walsh-Hadamard transform
mixes, read out through a low-rank coupling and an output gate (docs/model.md)."""

import mlx.core as mx

from backends.mlx import ops
from backends.mlx.linear import Linear, Output
from backends.mlx.parts import Part
from core.model.capsules import COUPLING
from core.model.context import KoopmanState, KoopmanTape
from core.model.table import TAPS


class Koopman(Part):
    """Mix positions by a recurrence. Letters: B rows, T positions, D width, C mixer channels."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        width = config.koopman.dim
        self.value = Linear(config.dim, width)
        self.gate = Linear(config.dim, width)
        self.decay = Linear(config.dim, width)
        self.decay_bias = mx.zeros((width,))
        self.conv = mx.zeros((width, TAPS))
        self.couple_in = mx.zeros((width, COUPLING))
        self.couple_out = mx.zeros((width, COUPLING))
        self.state_gain = mx.zeros((width,))
        self.o = Output(width, config, exact)

    def __call__(self, stream, context, stage, state):
        z_BTC, _, tape = self.recur(stream.x, context, state or self.start(stream.x, context))
        return stream._replace(x=self.gated(stream.x, z_BTC)), tape

    def start(self, x_BTD, context):
        """Return the state before the first token."""
        rows, width = x_BTD.shape[0], self._config.koopman.dim
        tail_BPC = mx.zeros((rows, TAPS - 1, width), dtype=x_BTD.dtype)
        return KoopmanState(tail_BPC, mx.zeros((rows, width), dtype=context.wide))

    def recur(self, x_BTD, context, state):
        """Return what is read out, what went in, and the tape."""
        kind, wide = x_BTD.dtype, context.wide
        values_BPC = mx.concatenate([state.tail, self.value(x_BTD)], axis=1)
        s_BTC = ops.short_conv(values_BPC, self.conv, context.history)
        # float32 or wider: a decay near 1 is a long memory, and bfloat16 has no number between 0.996 and 1.
        decay_BTC, scale_BTC = ops.decay(self.decay(x_BTD).astype(wide) + self.decay_bias, self._exact)
        # A factor of 0 forgets the document before.
        decay_BTC = mx.where(context.starts[..., None], 0.0, decay_BTC)
        # Mixed channels, so that every time constant sees every feature.
        drive_BTC = ops.hadamard(s_BTC, context.hadamard).astype(wide) * scale_BTC
        states_BTC = ops.scan(decay_BTC, drive_BTC, state.last, self._exact)
        read_BTC = states_BTC
        if context.draft is not None and context.draft.rule != "causal":
            read_BTC = mx.broadcast_to(states_BTC[:, -1:], states_BTC.shape)
        h_BTC = read_BTC.astype(kind)
        # The coupling acts on what is read, not on what is kept: so it needs no bound to be stable.
        h_BTC = h_BTC + ops.linear(h_BTC @ self.couple_in.astype(kind), self.couple_out)
        h_BTC = ops.hadamard(h_BTC, context.hadamard)
        h_BTC = ops.rms_norm(h_BTC, self._config.norm_eps, self._exact, self.state_gain)
        return h_BTC, s_BTC, KoopmanTape(values_BPC, states_BTC, state.last)

    def gated(self, x_BTD, z_BTC):
        """Return the layer's output: the gate follows the recurrence."""
        return self.o(z_BTC * ops.silu(self.gate(x_BTD), self._exact))

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        tail_BPC = ops.tail(tape.values, *context.kept.tail, empty=0.0)
        return KoopmanState(tail_BPC, ops.after(tape.states, n_B, tape.before))
