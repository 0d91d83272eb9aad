"""Optimizer rules in PyTorch: pure functions of tensors; the step plan brings every number that changes."""

import torch


def global_norm(grads):
    """Return the root of the sum of all squared gradients."""
    return torch.sqrt(torch.sum(torch.stack([torch.sum(torch.square(g)) for g in grads])))


def clip_scale(norm, limit):
    """Return the factor that brings a gradient of global norm `norm` to at most `limit` (None: 1)."""
    return torch.ones_like(norm) if limit is None else torch.clamp(limit / (norm + 1e-6), max=1.0)


def adamw(param, grad, m, v, lr, decay, bias1, bias2, beta1, beta2, eps):
    """Return (param, m, v) after one AdamW update, bias-corrected, with decoupled decay (Loshchilov & Hutter 2019)."""
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * torch.square(grad)
    update = (m / bias1) / (torch.sqrt(v / bias2) + eps)
    return param - lr * (update + decay * param), m, v
