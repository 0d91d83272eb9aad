"""The optimizer rules in float64, and Newton-Schulz by way of the singular values."""

import numpy as np

from core.config import TrainConfig

Array = np.ndarray


def adamw(
    param: Array, grads: list[Array], lr: float, decay: float, beta1: float, beta2: float, eps: float
) -> tuple[Array, Array, Array]:
    """Run AdamW over a list of gradients from zero state; return (param, m, v)."""
    m, v = np.zeros_like(param), np.zeros_like(param)
    for t, grad in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        param = param - lr * (update + decay * param)
    return param, m, v


def muon(
    param: Array, grads: list[Array], lr: float, decay: float, momentum: float, settings: TrainConfig
) -> tuple[Array, Array]:
    """Run Muon over a list of gradients of one matrix from zero momentum; return (param, m)."""
    m = np.zeros_like(param)
    for grad in grads:
        if not np.linalg.norm(grad) > 1e-9:
            continue
        m = momentum * m + grad
        x = grad + momentum * m
        if settings.muon_rows:
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        param = param - lr * (muon_scale(x, settings) * orthogonal(x, settings) + decay * param)
    return param, m


def orthogonal(x: Array, settings: TrainConfig) -> Array:
    """Apply the Newton-Schulz polynomial to the singular values: the same map, by way of the SVD."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / (np.linalg.norm(x) + 1e-7)
    triples = np.reshape(settings.muon_coefficients, (-1, 3))
    for i in range(settings.muon_iterations):
        a, b, c = triples[i % len(triples)]
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt


def muon_scale(x: Array, settings: TrainConfig) -> float:
    rows, columns = x.shape
    return max(1.0, rows / columns) ** 0.5 if settings.muon_scale == "ratio" else 0.2 * max(rows, columns) ** 0.5
