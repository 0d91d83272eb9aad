"""A step of the official train_gpt_mlx.py, said once more: what `scripts/bench_official` measures our step by.

Nothing of that script is here. What it computes, in which order, and what it leaves to MLX, is: norms of products and
means, MLX's own rope, attention, Adam and cross-entropy, the loss and its gradients compiled, every matrix with a
Newton-Schulz chain of its own, the optimizer not compiled, gradients scaled for a sum of micro-batches (of one here).
Its losses over four steps are held to the official ones (shared_tests/check/test_official_step.py).
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np

EPS, ROTATION, CAP = 1e-6, 10_000.0, 30.0
RATE, EMBED_RATE = 0.04, 0.05
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_STEPS = 0.85, 0.95, 500
EMBEDDING = "tok_emb.weight"


def normed(x: Any) -> Any:
    """Return x over its root mean square."""
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + EPS)


def attention(weights, prefix, x, heads):
    """Return what attention puts out for normed x (B, T, D)."""
    split = (*x.shape[:2], -1, x.shape[2] // heads)
    q, k, v = (mx.swapaxes((x @ weights[f"{prefix}.c_{n}.weight"].T).reshape(split), 1, 2) for n in "qkv")
    q, k = (mx.fast.rope(normed(h), split[3], traditional=False, base=ROTATION, scale=1.0, offset=0) for h in (q, k))
    q = q * weights[f"{prefix}.q_gain"][:, None, None]
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(split[3]), mask="causal")
    return mx.swapaxes(y, 1, 2).reshape(x.shape) @ weights[f"{prefix}.proj.weight"].T


def layer(weights, i, x, first, heads):
    """Return the stream after a layer; `first` is what entered the first one."""
    mix = weights[f"blocks.{i}.resid_mix"]
    x = mix[0] * x + mix[1] * first
    x = x + weights[f"blocks.{i}.attn_scale"] * attention(weights, f"blocks.{i}.attn", normed(x), heads)
    h = nn.relu(normed(x) @ weights[f"blocks.{i}.mlp.fc.weight"].T)
    return x + weights[f"blocks.{i}.mlp_scale"] * ((h * h) @ weights[f"blocks.{i}.mlp.proj.weight"].T)


def loss(weights, tokens, targets, layers, heads):
    """Return the mean nats of a target, from float32 weights under the official names."""
    x = first = normed(weights[EMBEDDING][tokens])
    skips = []
    for i in range(layers):
        if i >= layers // 2 and skips:
            x = x + weights["skip_weights"][i - layers // 2] * skips.pop()
        x = layer(weights, i, x, first, heads)
        if i < layers // 2:
            skips.append(x)
    logits = normed(x).reshape(-1, x.shape[-1]) @ weights[EMBEDDING].T
    return nn.losses.cross_entropy(CAP * mx.tanh(logits / CAP), targets.reshape(-1), reduction="mean")


def orthogonal(x):
    """Return a matrix with its singular values near 1."""
    tall = x.shape[0] > x.shape[1]
    a, b, c = COEFFICIENTS
    x = x / (mx.sqrt(mx.sum(x * x)) + 1e-7)
    x = x.T if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


class OfficialStep:
    """The weights, the optimizer and its state; a call is a step."""

    def __init__(self, weights: dict[str, Any], layers: int, heads: int):
        self.weights = {name: mx.array(value) for name, value in weights.items()}
        self.matrices = [name for name in weights if name.endswith(".weight") and name != EMBEDDING]
        self.vectors = [name for name in weights if name not in self.matrices and name != EMBEDDING]
        self.momenta = {name: mx.zeros_like(self.weights[name]) for name in self.matrices}
        self.adams = {
            group: mlx.optimizers.Adam(rate, betas=[0.9, 0.95], eps=1e-8, bias_correction=True)
            for group, rate in (("embedding", EMBED_RATE), ("vectors", RATE))
        }
        self.gradient = mx.compile(mx.value_and_grad(lambda w, x, y: loss(w, x, y, layers, heads)))
        self.steps = 0

    def __call__(self, tokens, targets) -> float:
        """Take a step on a batch; return its loss before."""
        value, grads = self.gradient(self.weights, tokens, targets)
        for _ in range(2):  # the parts of a micro-batch are added up, and then the micro-batches: here one of each
            value, grads = value * 1.0, {name: grad * 1.0 for name, grad in grads.items()}
            mx.eval(value, grads)
        share = min(self.steps / MOMENTUM_STEPS, 1.0)
        momentum = (1 - share) * FIRST_MOMENTUM + share * MOMENTUM
        new = {}
        for name in self.matrices:
            weight, grad = self.weights[name], grads[name]
            self.momenta[name] = momentum * self.momenta[name] + grad
            update = orthogonal(grad + momentum * self.momenta[name])
            new[name] = weight - RATE * (update * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)
        for group, names in (("embedding", [EMBEDDING]), ("vectors", self.vectors)):
            parts = ({name: of[name] for name in names} for of in (grads, self.weights))
            new |= self.adams[group].apply_gradients(*parts)
        self.weights = {name: new[name] for name in self.weights}
        self.steps += 1
        mx.eval(self.weights, self.momenta, [adam.state for adam in self.adams.values()])
        return float(np.array(value))
