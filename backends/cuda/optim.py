"""Optimizer rules in PyTorch: pure functions of tensors; the step plan brings every number that changes."""

import torch


def global_norm(grads):
    """Return the root of the sum of all squared gradients."""
    grads = list(grads)
    if grads[0].device.type != "cpu":  # a few launches, whatever the number of tensors
        return torch.nn.utils.get_total_norm(grads)
    # CUDA: on the CPU that adds one value after the other: 5e-4 off at 12 million of them
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


def newton_schulz(x, iterations, coefficients, dtype=None):
    """Return each matrix of a stack (N, rows, columns) with its singular values brought near 1 (Jordan et al. 2024).

    `coefficients` are three, or three for every iteration. `dtype` is what its products are computed in, None: that
    of x; the norm is taken in that of x, since Polar Express diverges from singular values above 1.05.
    """
    kept, tall = x.dtype, x.shape[-2] > x.shape[-1]
    x = torch.swapaxes(x, -1, -2) if tall else x
    x = x / (length(x) + 1e-7)
    x = x.to(dtype or kept)
    numbers = iter(coefficients * (3 * iterations // len(coefficients)))
    for a, b, c in zip(numbers, numbers, numbers, strict=True):
        gram = x @ torch.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.to(kept)
    return torch.swapaxes(x, -1, -2) if tall else x


def length(x):
    """Return the Frobenius norm of each matrix of a stack: (N, rows, columns) -> (N, 1, 1)."""
    return torch.sqrt(torch.sum(torch.square(x), dim=(-2, -1), keepdim=True))


def moves(grad):
    """Return which matrices of a stack have a gradient that is neither zero nor other than finite, as `length` does."""
    size = length(grad)
    return (size > 1e-9) & torch.isfinite(size)


def muon(param, grad, m, lr, decay, momentum, settings, dtype=None):
    """Return (param, m) of a stack (N, rows, columns) after one Muon update with Nesterov momentum and decoupled decay.

    A matrix whose gradient is zero or not finite gets no update and no decay. `settings` is a TrainConfig; `dtype` is
    that of newton_schulz.
    """
    live = moves(grad)
    buffer = momentum * m + grad
    update = grad + momentum * buffer
    if settings.muon_rows:
        rows = torch.sqrt(torch.sum(torch.square(update), dim=-1, keepdim=True))
        update = torch.where(rows > 1e-7, update / torch.clamp(rows, min=1e-7), 0.0)
    update = newton_schulz(update, settings.muon_iterations, settings.muon_coefficients, dtype)
    high, wide = param.shape[-2:]
    scale = max(1.0, high / wide) ** 0.5 if settings.muon_scale == "ratio" else 0.2 * max(high, wide) ** 0.5
    moved = param - lr * (scale * update + decay * param)
    return torch.where(live, moved, param), torch.where(live, buffer, m)


def rule(train, group, param, grad, slots, hyper, dtype=None, guarded=False):
    """Return (param, slots) after one update by the rule of a group: of a stack of matrices, for Muon, or of anything.

    `slots` holds the optimizer state by slot, `hyper` core.engine.plan.NUMBERS by name; `dtype` is
    that of newton_schulz. `guarded`: a matrix of a stack without a gradient stays as it is by AdamW, too.
    """
    rate, decay = hyper[f"lr_{group}"], hyper[f"decay_{group}"]
    if group == "matrix" and train.matrix_rule == "muon":
        param, m = muon(param, grad, slots["m"], rate, decay, hyper["momentum"], train, dtype)
        return param, {"m": m}
    rates = rate, decay, hyper["bias1"], hyper["bias2"]
    old = param, slots["m"], slots["v"]
    new = adamw(param, grad, *old[1:], *rates, train.beta1, train.beta2, train.eps)
    param, m, v = [torch.where(moves(grad), a, b) for a, b in zip(new, old, strict=True)] if guarded else new
    return param, {"m": m, "v": v}


def sgd(params, grads, momenta, lr, decay, momentum, scale):
    """Return (params, momenta), lists of tensors that are updated in place, after one step of SGD with momentum and
    decoupled decay; gradients count `scale` times.
    """
    # CUDA: a few launches, whatever the number of tensors
    torch._foreach_mul_(momenta, momentum)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(momenta, grads, alpha=scale)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(params, 1 - lr * decay)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(params, momenta, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
    return params, momenta


def average(old, param, decay):
    """Return the running average of a parameter after an update of it."""
    return decay * old + (1 - decay) * param


def running_mean(old, value, count):
    """Return the mean of `count` values of which `value` is the last and `old` the mean of those before it."""
    return old + (value - old) / count
