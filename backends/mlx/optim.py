"""Optimizer rules in MLX: pure functions of arrays; the step plan brings every number that changes."""

import mlx.core as mx


def global_norm(grads):
    """Return the root of the sum of all squared gradients."""
    return mx.sqrt(mx.sum(mx.stack([mx.sum(mx.square(g)) for g in grads])))


def clip_scale(norm, limit):
    """Return the factor that brings a gradient of global norm `norm` to at most `limit` (None: 1)."""
    return mx.ones_like(norm) if limit is None else mx.minimum(limit / (norm + 1e-6), 1.0)


def adamw(param, grad, m, v, lr, decay, bias1, bias2, beta1, beta2, eps):
    """Return (param, m, v) after one AdamW update, bias-corrected, with decoupled decay (Loshchilov & Hutter 2019)."""
    return _adamw(param, grad, m, v, lr, decay, bias1, bias2, (beta1, 1 - beta1), (beta2, 1 - beta2), eps)


def _adamw(param, grad, m, v, lr, decay, bias1, bias2, rates1, rates2, eps):
    """Do what adamw does; `rates` are a moment's share that stays and the share that is new."""
    m = rates1[0] * m + rates1[1] * grad
    v = rates2[0] * v + rates2[1] * mx.square(grad)
    update = (m / bias1) / (mx.sqrt(v / bias2) + eps)
    return param - lr * (update + decay * param), m, v


def newton_schulz(x, iterations, coefficients, dtype=None):
    """Return each matrix of a stack (N, rows, columns) with its singular values brought near 1 (Jordan et al. 2024).

    `coefficients` are three, or three for every iteration. `dtype` is what its products are computed in, None: that
    of x; the norm is taken in that of x, since Polar Express diverges from singular values above 1.05.
    """
    kept, tall = x.dtype, x.shape[-2] > x.shape[-1]
    x = mx.swapaxes(x, -1, -2) if tall else x
    x = x / (length(x) + 1e-7)
    x = x.astype(dtype or kept)
    numbers = iter(coefficients * (3 * iterations // len(coefficients)))
    for a, b, c in zip(numbers, numbers, numbers, strict=True):
        gram = x @ mx.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.astype(kept)
    return mx.swapaxes(x, -1, -2) if tall else x


def length(x):
    """Return the Frobenius norm of each matrix of a stack: (N, rows, columns) -> (N, 1, 1)."""
    return mx.sqrt(mx.sum(mx.square(x), axis=(-2, -1), keepdims=True))


def moves(grad):
    """Return which matrices of a stack have a gradient that is neither zero nor other than finite, as `length` does."""
    size = length(grad)
    return (size > 1e-9) & mx.isfinite(size)


def muon(param, grad, m, lr, decay, momentum, settings, dtype=None):
    """Return (param, m) of a stack (N, rows, columns) after one Muon update with Nesterov momentum and decoupled decay.

    A matrix whose gradient is zero or not finite gets no update and no decay. `settings` is a TrainConfig; `dtype` is
    that of newton_schulz.
    """
    live = moves(grad)
    buffer = momentum * m + grad
    update = grad + momentum * buffer
    if settings.muon_rows:
        rows = mx.sqrt(mx.sum(mx.square(update), axis=-1, keepdims=True))
        update = mx.where(rows > 1e-7, update / mx.maximum(rows, 1e-7), 0.0)
    update = newton_schulz(update, settings.muon_iterations, settings.muon_coefficients, dtype)
    high, wide = param.shape[-2:]
    scale = max(1.0, high / wide) ** 0.5 if settings.muon_scale == "ratio" else 0.2 * max(high, wide) ** 0.5
    moved = param - lr * (scale * update + decay * param)
    return mx.where(live, moved, param), mx.where(live, buffer, m)


def rule(train, group, param, grad, slots, hyper, dtype=None, guarded=False):
    """Return (param, slots) after one update by the rule of a group: of a stack of matrices, for Muon, or of anything.

    `slots` holds the optimizer state by slot, `hyper` core.engine.plan.NUMBERS by name, and `finite`: where that is
    false nothing changes; `dtype` is that of newton_schulz. `guarded`: a matrix of a stack without a
    gradient stays as it is by AdamW, too.
    """
    finite, decay = hyper["finite"], hyper[f"decay_{group}"]
    rate = mx.where(finite, hyper[f"lr_{group}"], 0.0)
    if group == "matrix" and train.matrix_rule == "muon":
        grad = mx.where(finite, grad, 0.0)  # as if there were none
        param, m = muon(param, grad, slots["m"], rate, decay, hyper["momentum"], train, dtype)
        return param, {"m": m}
    # MLX: a select of each result would be a kernel of its own; scalars that change nothing cost the one kernel none.
    rates1, rates2 = (
        [mx.where(finite, mx.array(share, param.dtype), 1.0) for share in (beta, 1 - beta)]
        for beta in (train.beta1, train.beta2)
    )
    grad = mx.where(finite, grad, -0.0)  # what it is added to stays as it is, the sign of a zero too
    bias = hyper["bias1"], hyper["bias2"]
    old = param, slots["m"], slots["v"]
    new = _adamw(param, grad, *old[1:], rate, decay, *bias, rates1, rates2, train.eps)
    param, m, v = [mx.where(moves(grad), a, b) for a, b in zip(new, old, strict=True)] if guarded else new
    return param, {"m": m, "v": v}


def sgd(params, grads, momenta, lr, decay, momentum, scale):
    """Return (params, momenta), lists of arrays, after one step of SGD with momentum and decoupled decay; gradients
    count `scale` times.
    """
    momenta = [momentum * m + scale * grad for m, grad in zip(momenta, grads, strict=True)]
    return [(1 - lr * decay) * param - lr * m for param, m in zip(params, momenta, strict=True)], momenta


def average(old, param, decay):
    """Return the running average of a parameter after an update of it."""
    return decay * old + (1 - decay) * param


def running_mean(old, value, count):
    """Return the mean of `count` values of which `value` is the last and `old` the mean of those before it."""
    return old + (value - old) / count
