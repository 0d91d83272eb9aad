"""The gated delta rule, token by token: each head keeps a matrix."""

import numpy as np

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Array, Stream, Text, Weights, output
from shared_tests.oracle.koopman import convolve
from shared_tests.reference.ops import linear, rms_norm, sigmoid, silu, softplus

EXAMPLE = {
    "blocks": ("delta",), "delta.heads": 4, "delta.key_heads": 2, "delta.key_dim": 5, "delta.value_dim": 7,
}  # fmt: skip
"""Five kinds of layers cannot share the four blocks of `everything` (`ALONE`), which the mini of `delta_ablate` stands
for."""
ALONE = True


def delta(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return what the gated delta rule of the normalised stream puts out."""
    settings, n = config.delta, stream.x
    rows, seq, _ = n.shape
    heads = settings.heads

    def entering(name: str, place: int, count: int) -> Array:
        """Return queries, keys or values, (B, T, count, channels)."""
        x = linear(n, w[f"{name}.weight"])
        x = convolve(x, w["conv"][place : place + x.shape[2]], text.starts) if settings.conv else x
        return silu(x, True).reshape(rows, seq, count, -1)

    q, k = (entering(name, i * settings.keys, settings.key_heads) for i, name in enumerate("qk"))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    v, beta = entering("v", 2 * settings.keys, heads), sigmoid(linear(n, w["beta.weight"]), True)
    decay = np.exp(-np.exp(w["decay_rate"]) * softplus(linear(n, w["decay.weight"]) + w["decay_bias"], True))
    y, state = np.empty_like(v), np.zeros((rows, heads, settings.key_dim, settings.value_dim))
    for t in range(seq):
        state[text.starts[:, t]] = 0
        for row in range(rows):
            for head in range(heads):
                shared = head * settings.key_heads // heads
                key, memory = k[row, t, shared], decay[row, t, head] * state[row, head]
                memory = memory + np.outer(key, beta[row, t, head] * (v[row, t, head] - key @ memory))
                y[row, t, head] = q[row, t, shared] @ memory / np.sqrt(settings.key_dim)
                state[row, head] = memory
    y = (rms_norm(y, config.norm_eps, True) * w["read_gain"]).reshape(rows, seq, -1)
    if settings.gate:
        y = y * silu(linear(n, w["gate.weight"]), True)
    return stream._replace(x=output(config, w, "o", y))
