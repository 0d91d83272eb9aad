"""A Koopman mixer, token by token."""

import numpy as np

from core.config import ModelConfig
from core.model import tables
from core.model.trunk import Stage
from shared_tests.oracle import Array, Stream, Text, Weights, output
from shared_tests.reference.ops import decay, hadamard, linear, rms_norm, silu

EXAMPLE = {"blocks": ("koopman",), "koopman.dim": 16}


def koopman(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return what a Koopman mixer of the normalised stream puts out."""
    _, z = recur(config, w, stream.x, text.starts)
    return stream._replace(x=gated(config, w, stream.x, z))


def recur(config: ModelConfig, w: Weights, n: Array, starts: Array) -> tuple[Array, Array]:
    """Return the convolved values and what is read out of the recurrence, both (B, T, C)."""
    transform = tables.hadamard(config.koopman.dim)
    d, gain = decay(linear(n, w["decay.weight"]) + w["decay_bias"], True)
    s = convolve(linear(n, w["value.weight"]), w["conv"], starts)
    h, state = np.empty_like(s), np.zeros_like(s[:, 0])
    for t in range(s.shape[1]):
        state[starts[:, t]] = 0
        state = d[:, t] * state + (s[:, t] @ transform) * gain[:, t]
        h[:, t] = state
    h = hadamard(h + h @ w["couple_in"] @ w["couple_out"].T, transform)
    return s, rms_norm(h, config.norm_eps, True) * w["state_gain"]


def gated(config: ModelConfig, w: Weights, n: Array, z: Array) -> Array:
    """Return the output projection of z through the gate of the normalised stream."""
    return output(config, w, "o", z * silu(linear(n, w["gate.weight"]), True))


def convolve(x: Array, weight: Array, starts: Array) -> Array:
    """Return the causal convolution (B, T, C) of x with weight (C, taps) along each document."""
    taps, out = weight.shape[1], np.empty_like(x)
    tail = np.zeros((len(x), taps - 1, x.shape[2]))  # the values before the current one, newest first
    for t in range(x.shape[1]):
        tail[starts[:, t]] = 0
        window = np.concatenate([x[:, t : t + 1], tail], 1)
        tail = window[:, :-1]
        out[:, t] = sum(weight[:, i] * window[:, i] for i in range(taps))
    return out
