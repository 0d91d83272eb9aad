"""Experts by hand: token by token, those of the highest probability."""

import numpy as np

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights, below, output
from shared_tests.oracle.mlp import mlp
from shared_tests.reference.ops import leaky_relu2, linear, relu2, rms_norm, softmax

EXAMPLE = {
    "layers": 5, "experts.count": 3, "experts.active": 2, "experts.hidden": 20, "experts.shared": 12,
    "experts.start": 0.6,
}  # fmt: skip
"""In `everything` block 3 has experts, which layer 3 uses twice; block 0, which layers 0 and 4 share, has none."""


def experts(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return the weighted sum of a few experts' MLPs of each token, and of the shared one's."""
    own, (rows, seq, dim) = config.experts, stream.x.shape
    activation = {"relu2": relu2, "leaky_relu2": leaky_relu2}[config.mlp.activation]
    y = mlp(config, below(w, "shared."), stream, stage, text).x if own.shared else np.zeros_like(stream.x)
    for b in range(rows):
        for t in range(seq):
            n = stream.x[b, t]
            p = softmax(w["router"] @ rms_norm(n, config.norm_eps, True), True)
            chosen = sorted(range(own.count), key=lambda e: (-p[e], e))[: own.active]
            for e in chosen:
                a = activation(linear(n, w["up.weight"])[e * own.hidden : (e + 1) * own.hidden], True)
                share = 1.0 if own.active == 1 else p[e] / sum(p[i] for i in chosen)
                y[b, t] += share * output(config, w, "down", a)[e * dim : (e + 1) * dim]
    return stream._replace(x=y)
