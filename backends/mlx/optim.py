"""Optimizer rules in MLX: pure functions of arrays; the step plan brings every number that changes."""

import mlx.core as mx

from core.params import GROUPS, averaged, same_shapes


def global_norm(grads):
    """Return the root of the sum of all squared gradients."""
    return mx.sqrt(mx.sum(mx.stack([mx.sum(mx.square(g)) for g in grads])))


def clip_scale(norm, limit):
    """Return the factor that brings a gradient of global norm `norm` to at most `limit` (None: 1)."""
    return mx.ones_like(norm) if limit is None else mx.minimum(limit / (norm + 1e-6), 1.0)


def adamw(param, grad, m, v, lr, decay, bias1, bias2, beta1, beta2, eps):
    """Return (param, m, v) after one AdamW update, bias-corrected, with decoupled decay (Loshchilov & Hutter 2019)."""
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * mx.square(grad)
    update = (m / bias1) / (mx.sqrt(v / bias2) + eps)
    return param - lr * (update + decay * param), m, v


def newton_schulz(x, iterations, coefficients):
    """Return each matrix of a stack (N, rows, columns) with its singular values brought near 1 (Jordan et al. 2024)."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = mx.swapaxes(x, -1, -2) if tall else x
    x = x / (length(x) + 1e-7)
    for _ in range(iterations):
        gram = x @ mx.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return mx.swapaxes(x, -1, -2) if tall else x


def length(x):
    """Return the Frobenius norm of each matrix of a stack: (N, rows, columns) -> (N, 1, 1)."""
    return mx.sqrt(mx.sum(mx.square(x), axis=(-2, -1), keepdims=True))


def muon(param, grad, m, lr, decay, momentum, settings):
    """Return (param, m) of a stack (N, rows, columns) after one Muon update with Nesterov momentum and decoupled decay.

    A matrix whose gradient is zero or not finite gets no update and no decay. `settings` is a TrainConfig.
    """
    size = length(grad)
    live = (size > 1e-9) & mx.isfinite(size)
    buffer = momentum * m + grad
    update = grad + momentum * buffer
    if settings.muon_rows:
        rows = mx.sqrt(mx.sum(mx.square(update), axis=-1, keepdims=True))
        update = mx.where(rows > 1e-7, update / mx.maximum(rows, 1e-7), 0.0)
    update = newton_schulz(update, settings.muon_iterations, settings.muon_coefficients)
    high, wide = param.shape[-2:]
    scale = max(1.0, high / wide) ** 0.5 if settings.muon_scale == "ratio" else 0.2 * max(high, wide) ** 0.5
    moved = param - lr * (scale * update + decay * param)
    return mx.where(live, moved, param), mx.where(live, buffer, m)


def update(config, params, state, grads, hyper):
    """Return (params, state) of every parameter that has a gradient after one update by the rule of its group.

    config is a RunConfig; params, state and grads are keyed by name; hyper holds core.schedule.NUMBERS by name.
    """
    train = config.train
    new_params, new_state = {}, {}
    for group in GROUPS:
        decay = hyper["weight_decay"] if group == "matrix" else 0.0
        for shaped in same_shapes(config.model, group):
            names = [name for name in shaped if name in grads]
            if not names:
                continue
            if group == "matrix" and train.matrix_rule == "muon":
                weight = mx.stack([params[name] for name in names])
                grad = mx.stack([grads[name] for name in names])
                m = mx.stack([state[f"{name}.m"] for name in names])
                weight, m = muon(weight, grad, m, hyper["lr_matrix"], decay, hyper["momentum"], train)
                for i, name in enumerate(names):
                    new_params[name], new_state[f"{name}.m"] = weight[i], m[i]
                continue
            for name in names:
                new_params[name], new_state[f"{name}.m"], new_state[f"{name}.v"] = adamw(
                    params[name],
                    grads[name],
                    state[f"{name}.m"],
                    state[f"{name}.v"],
                    hyper[f"lr_{group}"],
                    decay,
                    hyper["bias1"],
                    hyper["bias2"],
                    train.beta1,
                    train.beta2,
                    train.eps,
                )
    return new_params, new_state


def averages(config, params, state, hyper):
    """Return the running averages, `<param>.ema`, after the update that gave `params`."""
    decay, names = hyper["average"], averaged(config.model, config.train)
    return {f"{n}.ema": decay * state[f"{n}.ema"] + (1 - decay) * params[n] for n in names}
