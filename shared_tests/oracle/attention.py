"""Attention, token by token: a token looks at the keys of its document so far."""

import numpy as np

from core.config import ModelConfig
from core.model.tables import rope_tables
from core.model.trunk import Stage
from shared_tests.oracle import Array, Stream, Text, Weights, output
from shared_tests.oracle.koopman import convolve
from shared_tests.reference.ops import linear, rms_norm, rope, sigmoid, softmax

EXAMPLE = {
    "blocks": ("attention",), "attention.heads": 2, "attention.kv_heads": 1, "attention.rope_dims": 8,
    "attention.conv": True, "attention.xsa": "projected", "attention.xsa_layers": 2, "attention.head_gate": "double",
    "attention.head_gate_width": 5, "attention.head_gate_scale": 0.7, "attention.head_width": 10,
    "attention.output_gate": True,
}  # fmt: skip


def attention(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return what attention of the normalised stream puts out."""
    settings, entered = config.attention, stream.x
    (rows, seq, _), width = entered.shape, settings.head_width or config.dim // settings.heads
    turn = rope_tables(seq, settings.rope_dims, settings.rope_base)
    n = convolve(entered, w["conv"], text.starts) if settings.conv else entered

    def heads(name: str) -> Array:
        y = linear(n, w[f"{name}.weight"])
        if name == "v" and stage.layer in stream.to_values:
            y = y + stream.to_values[stage.layer]
        return y.reshape(rows, seq, -1, width).swapaxes(1, 2)

    def unit(name: str) -> Array:
        x = rms_norm(heads(name), config.norm_eps, True)
        return rope(x + x * w[f"{name}_norm_gain"] if config.norm_gains else x, *turn)

    q, k, v, y = unit("q"), unit("k"), heads("v"), np.empty((rows, seq, settings.heads, width))
    q = q if config.norm_gains else q * w["q_gain"][:, None, None]
    for row in range(rows):
        start = 0
        for t in range(seq):
            start = t if text.starts[row, t] else start
            for head in range(settings.heads):
                shared = head * settings.kv_heads // settings.heads
                scores = k[row, shared, start : t + 1] @ q[row, head, t] / np.sqrt(width)
                y[row, t, head] = softmax(scores, True) @ v[row, shared, start : t + 1]
                if settings.xsa != "none" and config.layers - stage.layer <= (settings.xsa_layers or config.layers):
                    own = v[row, shared, t]
                    along = y[row, t, head] @ own / (own @ own + 1e-12) if settings.xsa == "projected" else 1.0
                    # A token that sees itself alone has y = own.
                    y[row, t, head] = 0.0 if t == start else y[row, t, head] - own * along
                if settings.head_gate != "none":
                    product = w["head_gate"][head] @ entered[row, t, : settings.head_gate_width]
                    most = {"sigmoid": 1.0, "double": 2.0}[settings.head_gate]
                    y[row, t, head] *= most * sigmoid(settings.head_gate_scale * product, True)
    y = y.reshape(rows, seq, -1)
    if settings.output_gate:
        y = y * sigmoid(linear(entered, w["gate.weight"]), True)
    return stream._replace(x=output(config, w, "o", y))
