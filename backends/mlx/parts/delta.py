"""Layer kind `delta`: a short convolution, then the gated delta rule, read out through a norm per head and an output
gate (docs/model.md)."""

import mlx.core as mx

from backends.mlx import delta, ops
from backends.mlx.linear import Linear, Output
from backends.mlx.parts import Part
from core.model.context import DeltaState, DeltaTape
from core.model.delta import UNIT
from core.model.table import TAPS


class Delta(Part):
    """Mix positions by the gated delta rule. Letters: B rows, T positions, D width, H heads, G heads of keys,
    K channels of a key, V of a value, C channels of queries, keys and values together."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact, settings = config, exact, config.delta
        self.q = Linear(config.dim, settings.keys)
        self.k = Linear(config.dim, settings.keys)
        self.v = Linear(config.dim, settings.values_wide)
        if settings.gate:
            self.gate = Linear(config.dim, settings.values_wide)
        self.beta = Linear(config.dim, settings.heads)
        self.decay = Linear(config.dim, settings.heads)
        self.decay_bias = mx.zeros((settings.heads,))
        self.decay_rate = mx.zeros((settings.heads,))
        if settings.conv:
            self.conv = mx.zeros((settings.entering, TAPS))
        self.read_gain = mx.zeros((settings.value_dim,))
        self.o = Output(settings.values_wide, config, exact)

    def __call__(self, stream, context, stage, state):
        x_BTD, kind, wide = stream.x, stream.x.dtype, context.wide
        settings, exact, tail_BPC = self._config.delta, self._exact, None
        state, split = state or self.start(x_BTD, context), (*x_BTD.shape[:2], settings.heads, -1)
        s_BTC = mx.concatenate([self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)], axis=-1)
        if settings.conv:
            tail_BPC = mx.concatenate([state.tail, s_BTC], axis=1)
            s_BTC = ops.short_conv(tail_BPC, self.conv, context.history)
        # A matrix that thousands of tokens write into: float32 or wider.
        s_BTC = ops.silu(s_BTC, exact).astype(wide)
        q_BTGK, k_BTGK = (
            self.unit(s_BTC[..., : settings.keys]),
            self.unit(s_BTC[..., settings.keys : 2 * settings.keys]),
        )
        q_BTHK, k_BTHK = self.shared(q_BTGK * settings.key_dim**-0.5), self.shared(k_BTGK)
        v_BTHV = s_BTC[..., 2 * settings.keys :].reshape(split)
        beta_BTH = ops.sigmoid(self.beta(x_BTD).astype(wide), exact)
        rate_BTH = ops.softplus(self.decay(x_BTD).astype(wide) + self.decay_bias, exact)
        decay_BTH = -ops.exp(self.decay_rate.astype(wide), exact) * rate_BTH
        given = (q_BTHK, k_BTHK, v_BTHV, beta_BTH, decay_BTH, context.documents, state.last)
        o_BTHV, d_BTHV = delta.rule(*given, exact)
        tape = DeltaTape(tail_BPC, k_BTGK, d_BTHV, decay_BTH, state.last)
        if context.draft is not None and context.draft.rule != "causal":
            o_BTHV = self.at_end(q_BTHK, k_BTHK, v_BTHV, beta_BTH, tape, context)
        o_BTHV = ops.rms_norm(o_BTHV.astype(kind), self._config.norm_eps, exact, self.read_gain)
        y_BTC = o_BTHV.reshape(*split[:2], -1)
        if settings.gate:
            y_BTC = y_BTC * ops.silu(self.gate(x_BTD), exact)
        return stream._replace(x=self.o(y_BTC)), tape

    def unit(self, x_BTC):
        """Return queries or keys of length 1: with beta up to 1 no write then grows a state, whatever the weights."""
        width = self._config.delta.key_dim
        return ops.rms_norm(x_BTC.reshape(*x_BTC.shape[:2], -1, width), UNIT / width, self._exact) * width**-0.5

    def shared(self, x_BTGK):
        """Return keys or queries for every head."""
        times = self._config.delta.heads // self._config.delta.key_heads
        return x_BTGK if times == 1 else mx.repeat(x_BTGK, times, axis=2)

    def start(self, x_BTD, context):
        """Return the state before the first token."""
        rows, settings, tail_BPC = x_BTD.shape[0], self._config.delta, None
        if settings.conv:
            tail_BPC = mx.zeros((rows, TAPS - 1, settings.entering), dtype=x_BTD.dtype)
        shape = (rows, settings.heads, settings.key_dim, settings.value_dim)
        return DeltaState(tail_BPC, mx.zeros(shape, dtype=context.wide))

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk, from the tokens' factors."""
        # Of the last document's kept tokens; the first of a document decays nothing that is kept.
        kept_BT = (ops.span(-n_B, tape.decay.shape[1]) < 0) & (context.documents == context.kept.last)
        last_BHKV = self.after(tape, kept_BT, context.kept.last)
        tail_BPC = None if tape.tail is None else ops.tail(tape.tail, *context.kept.tail, empty=0.0)
        return DeltaState(tail_BPC, last_BHKV)

    def after(self, tape, kept_BT, last_B1):
        """Return the matrices (B, H, K, V) after the marked tokens, all of the document `last_B1`."""
        decay_BTH = mx.where(kept_BT[..., None], tape.decay, 0.0)
        later_BTH = mx.cumsum(decay_BTH, axis=1, reverse=True, inclusive=False)
        left_BTH = mx.where(kept_BT[..., None], ops.exp(later_BTH, self._exact), 0.0)
        k_BHKT = mx.transpose(self.shared(tape.keys) * left_BTH[..., None], (0, 2, 3, 1))
        whole_BH = mx.where(last_B1 == 0, ops.exp(mx.sum(decay_BTH, axis=1), self._exact), 0.0)
        return whole_BH[..., None, None] * tape.before + k_BHKT @ mx.swapaxes(tape.written, 1, 2)

    def at_end(self, q_BTHK, k_BTHK, v_BTHV, beta_BTH, tape, context):
        """Return what all places of a draft's block read of its end, (B, T, H, V), by its rule (docs/orthrus.md)."""
        if context.draft.rule == "first_order":  # each writes what the state before the block lacks, undecayed
            known_BTHV = (k_BTHK[..., None, :] @ tape.before[:, None]).squeeze(-2)
            known_BTHV = mx.where((context.documents == 0)[..., None, None], known_BTHV, 0.0)
            tape = tape._replace(written=beta_BTH[..., None] * (v_BTHV - known_BTHV))
        last_B1 = context.documents[:, -1:]
        last_BHKV = self.after(tape, context.documents == last_B1, last_B1)
        return (q_BTHK[..., None, :] @ last_BHKV[:, None]).squeeze(-2)
