"""Kernels are used after they have given on this very device what the composed forms give, gradients included."""

import functools
import os

import mlx.core as mx

from backends.mlx import kernels, ops
from core.console import one_line

AGREES = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 4e-3}
"""Relative root mean square of the difference from the composed form in float32: a narrower result is rounded once."""


def _normal(key, *shape):
    return mx.random.normal(shape, key=mx.random.key(key))


def _outcome(function, *given):
    """Return what a function gives, and its gradients, in float32."""
    out = function(*given)
    _, grads = mx.vjp(function, list(given), [_normal(9, *out.shape).astype(out.dtype)])
    return [x.astype(mx.float32) for x in (out, *grads)]


def scan(dtype, narrow):
    """Return results of ops.scan on rows of one chunk, and of more chunks than a group has warps."""
    found = []
    for rows, seq, width in ((3, 5, 1), (2, 1061, 33)):
        decay = 0.9 + 0.1 * mx.sigmoid(3 * _normal(1, rows, seq, width))  # else a chunk would hand nothing on
        decay = decay * (_normal(2, rows, seq, 1) < 2)
        given = decay, _normal(3, rows, seq, width), _normal(4, rows, width)
        found += _outcome(lambda d, u, start: ops.scan(d, u, start, False), *given)
    return found


def short_conv(dtype, narrow):
    """Return results of ops.short_conv on rows of several documents; not narrow: values of `dtype` in float32."""
    x, weight = (_normal(i, *shape).astype(dtype) for i, shape in ((1, (3, 41, 33)), (2, (33, 4))))
    x = x if narrow else x.astype(mx.float32)
    documents = mx.cumsum((_normal(3, 3, 41) > 1).astype(mx.int32), axis=1)
    return _outcome(lambda x, weight: ops.short_conv(x, weight, documents), x, weight.astype(mx.float32))


TRIALS = {"scan": (scan, "in chunks"), "short_conv": (short_conv, "composed")}


def form(op, dtype):
    """Return the form in which `op` is computed from now on where the engine computes in `dtype`, in words."""
    return TRIALS[op][1] if kernels.language() is None or dtype not in AGREES else tried(op, dtype)


@functools.cache
def tried(op, dtype):
    """Compare the kernels of `op` with its composed form, once a process; return what `form` does."""
    results, composed = TRIALS[op]
    pair, before = (op, mx.float32 if op == "scan" else dtype), set(kernels.TRUSTED)
    kernels.TRUSTED.clear()
    try:
        wanted = results(dtype, False)
        kernels.TRUSTED.add(pair)
        pairs = zip(results(dtype, True), wanted, strict=True)
        gaps = [float(mx.linalg.norm(a - b) / mx.linalg.norm(b)) for a, b in pairs]
        failure = "" if all(gap <= AGREES[pair[1]] for gap in gaps) else f"wrong here, by {max(gaps):.1e}"
    except Exception as error:  # whatever the device's compiler raises: it is said, and the composed form is used
        failure = f"does not run: {one_line(error)[:120]}"
    kernels.TRUSTED |= before
    if not failure:
        return "kernels"
    kernels.TRUSTED.discard(pair)
    return f"{composed} (kernels passed over: {failure})"


def notes(model, dtype, exact):
    """Try the kernels that a model (a ModelConfig) needs; return which forms it uses, for the engine's notes."""
    device, recurrent = kernels.language() is not None, model.mixes("koopman", "skc")
    lines = []
    if recurrent or not device:
        lines.append(f"scan: {'exact, step by step' if exact else form('scan', dtype)}")
    if device and (recurrent or model.attention.conv or (model.delta.conv and model.mixes("delta"))):
        lines.append(f"short convolution: {form('short_conv', dtype)}")
    limits = [os.environ.get(f"MLX_MAX_{unit}_PER_BUFFER") for unit in ("OPS", "MB")]
    if any(limits):
        lines.append("command buffers: {} operations, {} MB".format(*(limit or "MLX's" for limit in limits)))
    return lines
