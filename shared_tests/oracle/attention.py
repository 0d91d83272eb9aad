"""Attention, token by token: a token looks at the keys of its document so far."""

import numpy as np

from core.config import ModelConfig
from core.model.tables import rope_tables
from core.model.trunk import Stage
from shared_tests.oracle import Array, Stream, Text, Weights, output
from shared_tests.oracle.koopman import convolve
from shared_tests.reference.ops import linear, rms_norm, rope, softmax

EXAMPLE = {
    "blocks": ("attention",), "attention.heads": 2, "attention.kv_heads": 1, "attention.rope_dims": 8,
    "attention.conv": True,
}  # fmt: skip


def attention(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return what attention of the normalised stream puts out."""
    settings, n = config.attention, stream.x
    rows, seq, dim = n.shape
    turn = rope_tables(seq, settings.rope_dims, settings.rope_base)
    n = convolve(n, w["conv"], text.starts) if settings.conv else n

    def heads(name: str) -> Array:
        y = linear(n, w[f"{name}.weight"])
        if name == "v" and stage.layer in stream.to_values:
            y = y + stream.to_values[stage.layer]
        return y.reshape(rows, seq, -1, dim // settings.heads).swapaxes(1, 2)

    q, k = (rope(rms_norm(heads(name), config.norm_eps, True), *turn) for name in "qk")
    q, v, y = q * w["q_gain"][:, None, None], heads("v"), np.empty((rows, seq, settings.heads, dim // settings.heads))
    for row in range(rows):
        start = 0
        for t in range(seq):
            start = t if text.starts[row, t] else start
            for head in range(settings.heads):
                shared = head * settings.kv_heads // settings.heads
                scores = k[row, shared, start : t + 1] @ q[row, head, t] / np.sqrt(dim // settings.heads)
                y[row, t, head] = softmax(scores, True) @ v[row, shared, start : t + 1]
    return stream._replace(x=output(config, w, "o", y.reshape(rows, seq, dim)))
