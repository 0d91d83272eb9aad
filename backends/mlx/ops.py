"""The ops of the model in MLX. Same names and signatures as backends/cuda/ops.py.

`exact` picks the float64-safe form: MLX's float64 exp, softmax, logsumexp, rms_norm and attention are only good to
1e-7, so the exact forms are built from power, sums and products. The fast forms are the framework's own; where
`exact` is ignored, one form is both good and fast.
Shapes: B rows, T positions, S key positions, H heads, G key/value heads, K channels of a head, D width, V vocabulary.
"""

import math
from typing import Any

import mlx.core as mx

from backends.mlx import scan as recurrence
from backends.mlx.kernels import short_conv as kernels
from backends.mlx.kernels import trusted
from core.model.ngrams import XOR_MULTIPLIERS

MASKED = -1e30
"""Score of a hidden key: its weight underflows to exactly 0, and no inf - inf can arise."""


def exp(x, exact):
    """Return e^x."""
    return mx.power(mx.array(math.e, x.dtype), x) if exact else mx.exp(x)


def softmax(x, exact):
    """Return the softmax over the last axis."""
    if not exact:
        return mx.softmax(x, axis=-1)
    # The largest cancels, so that nothing overflows; its gradient cancels too, which is why it is stopped.
    weights = exp(x - mx.stop_gradient(mx.max(x, axis=-1, keepdims=True)), exact)
    return weights / mx.sum(weights, axis=-1, keepdims=True)


def logsumexp(x, exact):
    """Return log(sum(exp(x))) over the last axis."""
    if not exact:
        return mx.logsumexp(x, axis=-1)
    top = mx.stop_gradient(mx.max(x, axis=-1, keepdims=True))
    return mx.squeeze(top, -1) + mx.log(mx.sum(exp(x - top, exact), axis=-1))


def embedding(tokens, weight):
    """Return rows of weight (V, E) by token: (B, T) int -> (B, T, E)."""
    return weight[tokens]


def linear(x, weight):
    """Return x @ weight.T; weight is (out, in), cast to x's type."""
    return x @ weight.astype(x.dtype).T


def rms_norm(x, eps, exact, gain=None):
    """Return x / sqrt(mean(x^2) + eps) over the last axis, computed in float32 for bfloat16 input, times gain (D,)."""
    gain = None if gain is None else gain.astype(x.dtype)
    if not exact:
        return mx.fast.rms_norm(x, gain, eps)
    # A mean of squares over a thousand channels needs more than bfloat16's eight bits.
    wide = x if x.dtype == mx.float64 else x.astype(mx.float32)
    normed = (wide * mx.rsqrt(mx.mean(mx.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return normed if gain is None else normed * gain


def rope(x, cos, sin):
    """Rotate the first 2 * cos.shape[-1] channels, half-split, by +angle: (x1 cos - x2 sin, x1 sin + x2 cos).

    x (B, H, T, K); cos and sin (T, R / 2).
    """
    half = cos.shape[-1]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return mx.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest], axis=-1)


def document_ids(tokens, bos):
    """Return the number of BOS tokens up to and including each position: (B, T) int -> (B, T) int32."""
    return mx.cumsum((tokens == bos).astype(mx.int32), axis=-1)


def causal_mask(queries, keys, documents):
    """Return which keys each query may see: True where key <= query, aligned bottom-right, and in one document.

    queries, keys: counts T <= S; documents: (B, S) int of the keys, or None. Returns (T, S), or (B, 1, T, S).
    """
    # Counted from the end: the keys of a state stand in front, and are all in the past.
    query, key = mx.arange(keys - queries, keys)[:, None], mx.arange(keys)[None, :]
    mask = key <= query
    if documents is None:
        return mask
    same = documents[:, keys - queries :, None] == documents[:, None, :]
    return mx.logical_and(same, mask)[:, None]


def attention(q, k, v, mask, exact):
    """Return softmax(q k^T / sqrt(K), hidden keys left out) v, each key/value head shared by H / G query heads.

    q (B, H, T, K), k and v (B, G, S, K), mask from `causal_mask`, or None: causal over the whole row (T = S only).
    """
    rows, heads, queries, width = q.shape
    shared, keys = k.shape[1], k.shape[2]
    if mask is None and queries != keys:
        raise ValueError(f"attention without a mask needs as many queries as keys, got {queries} and {keys}")
    if not exact:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask="causal" if mask is None else mask)
    mask = causal_mask(queries, keys, None) if mask is None else mask
    grouped = q.reshape(rows, shared, heads // shared, queries, width)
    scores = grouped @ mx.swapaxes(k, -1, -2)[:, :, None] * width**-0.5
    scores = mx.where(mask if mask.ndim == 2 else mask[:, :, None], scores, mx.array(MASKED, scores.dtype))
    return (softmax(scores, exact) @ v[:, :, None]).reshape(rows, heads, queries, width)


def exclude(y, v, alone, projected):
    """Return y - v, each v shared by H / G heads, or, if `projected`, y without its part along v; 0 where `alone`.

    y (B, T, H, K), v (B, T, G, K), alone (B, T) bool: tokens of which y is v, exactly 0 then and without a gradient.
    """
    rows, seq, shared, width = v.shape
    # A norm behind it multiplies gradients of nothing by 1 / sqrt(eps): y's and v's would cancel, their rounding not.
    y, v, alone = y.reshape(rows, seq, shared, -1, width), v[..., None, :], alone[..., None, None, None]
    left: Any = _orthogonal(y, v, alone) if projected else [mx.where(alone, mx.array(0.0, y.dtype), y - v)]
    return left[0].reshape(rows, seq, -1, width)


@mx.custom_function
def _orthogonal(y, v, alone):
    wide = mx.float64 if y.dtype == mx.float64 else mx.float32
    # 1e-12 keeps the gradient finite where v is 0.
    scale = mx.rsqrt(mx.sum(mx.square(v.astype(wide)), axis=-1, keepdims=True) + 1e-12)
    unit = v * scale
    along = mx.sum(y * unit, axis=-1, keepdims=True)
    return mx.where(alone, 0.0, y - along * unit).astype(y.dtype), unit, scale, along


@_orthogonal.vjp
def _orthogonal_gradients(primals, grads, results):
    """By the symmetry of the projection: as an autograd of the norm, it would walk memory twice as often."""
    (out, unit, scale, along), alone = results, primals[2]
    grad = mx.where(alone, mx.array(0.0, unit.dtype), grads[0])
    slope = mx.sum(grad * unit, axis=-1, keepdims=True)
    dy = grad - slope * unit
    dv = -mx.sum(scale * (along * dy + slope * out), axis=3, keepdims=True)
    return dy.astype(out.dtype), dv.astype(out.dtype), mx.zeros_like(alone)


def relu2(x, exact):
    """Return max(x, 0)^2."""
    return mx.square(mx.maximum(x, 0))


def leaky_relu2(x, exact):
    """Return LeakyReLU(x, slope 0.5)^2."""
    return mx.square(mx.maximum(x, 0.5 * x))


def sigmoid(x, exact):
    """Return 1 / (1 + e^-x)."""
    # Of MLX's functions tanh is good in float64, exp is not.
    return (1 + mx.tanh(x / 2)) / 2 if exact else mx.sigmoid(x)


def silu(x, exact):
    """Return x / (1 + e^-x)."""
    return x * sigmoid(x, exact)


def softplus(x, exact):
    """Return log(1 + e^x)."""
    # Of MLX's functions log1p is good in float64, logaddexp is not.
    return mx.maximum(x, 0) + mx.log1p(exp(-mx.abs(x), exact)) if exact else mx.logaddexp(x, mx.array(0.0, x.dtype))


def decay(x, exact):
    """Return d = 1 / (1 + e^x) and the drive's scale sqrt(1 - d^2 + 1e-6), which keeps a unit input's variance at 1.

    1 - d^2 is (1 - d)(1 + d) with 1 - d = 1 / (1 + e^-x): nothing cancels when d is close to 1.
    """
    d = sigmoid(-x, exact)
    # The 1e-6 bounds the root's gradient where d is 1.
    return d, mx.sqrt(sigmoid(x, exact) * (1 + d) + 1e-6)


def hadamard(x, matrix):
    """Return x @ matrix, a Walsh-Hadamard matrix (symmetric), cast to x's type: (..., C) -> (..., C)."""
    return x @ matrix.astype(x.dtype)


def ngram_buckets(ids, documents, multipliers, buckets):
    """Return core.model.ngrams.ngram_buckets on the device: rows of the stacked tables, -1 where nothing counts.

    ids and documents (B, P + T) int, of which P positions come before; multipliers[order][head]. Returns (B, T, tables)
    int32.
    """
    before = len(multipliers)
    # An id of -1 stands for no token: hashed as 0, then masked.
    seq, safe = ids.shape[1] - before, mx.maximum(ids, 0).astype(mx.uint32)
    here, rows, live = documents[:, before:], [], ids[:, before:] >= 0
    for order, heads in enumerate(multipliers, 1):
        oldest = slice(before - order, before - order + seq)
        live = live & (ids[:, oldest] >= 0) & (documents[:, oldest] == here)
        for p in heads:
            h = mx.zeros_like(safe[:, before:])
            for lag in range(order, -1, -1):
                step = safe[:, before - lag : before - lag + seq]
                h = (h * mx.array(p % buckets, mx.uint32) + step) % mx.array(buckets, mx.uint32)
            rows.append(mx.where(live, h.astype(mx.int32) + len(rows) * buckets, -1))
    return mx.stack(rows, axis=-1).astype(mx.int32)


def xor_buckets(ids, documents, buckets):
    """Return the row of the table that every pair reads by the hash xor, the last where the pair does not count.

    ids and documents (B, 1 + T) int, of which one position comes before. Returns (B, T, 1) int32.
    """
    # uint32 holds the products of ids up to 65,535, the largest that are hashed; int32 ends at 36,313 * 59,138.
    safe, last = mx.maximum(ids, 0).astype(mx.uint32), buckets - 1
    newer, older = (mx.array(multiplier, mx.uint32) for multiplier in XOR_MULTIPLIERS)
    rows = ((safe[:, 1:] * newer) ^ (safe[:, :-1] * older)) % mx.array(last, mx.uint32)
    live = (ids[:, 1:] >= 0) & (ids[:, :-1] >= 0) & (documents[:, 1:] == documents[:, :-1])
    return mx.where(live, rows.astype(mx.int32), last)[..., None]


def hashed_rows(table, rows):
    """Return rows of `table` (R, W) side by side: (B, T, N) int -> (B, T, N * W), zeros where the index is -1.

    A row that is all zero was pruned: it gets no gradient and stays zero.
    """
    picked = table[mx.maximum(rows, 0)]
    # A zero row would else be moved by its gradient, and the artifact would have to store it.
    live = (rows >= 0)[..., None] & mx.any(picked != 0, axis=-1, keepdims=True)
    return mx.where(live, picked, mx.array(0.0, table.dtype)).reshape(*rows.shape[:2], -1)


def short_conv(x, weight, documents):
    """Return sum_i weight[:, i] * x_{t-i} over the taps i whose position is in t's document.

    x (B, P + T, C) and documents (B, P + T) int begin with the P = taps - 1 positions before; weight (C, taps), column
    0 is the current token. Returns (B, T, C).
    """
    if trusted("short_conv", x):
        return _short_conv(x, weight, documents)
    taps = weight.shape[1]
    seq, weight = x.shape[1] - taps + 1, weight.astype(x.dtype)
    here = documents[:, taps - 1 :]
    y = weight[:, 0] * x[:, taps - 1 :]
    # Lag by lag, each masked by its own document: zeroing at the start of a document alone would let older taps in.
    for i in range(1, taps):
        part = slice(taps - 1 - i, taps - 1 - i + seq)
        y = y + weight[:, i] * mx.where((documents[:, part] == here)[..., None], x[:, part], mx.array(0.0, x.dtype))
    return y


@mx.custom_function
def _short_conv(x, weight, documents):
    return kernels.forward(x, weight, documents)


@_short_conv.vjp
def _short_conv_gradients(primals, grad, y):
    x, weight, documents = primals
    return *kernels.backward(x, weight, documents, grad), mx.zeros_like(documents)


def span(first, size):
    """Return first[b] + 0, 1, ... of every row b: (B,) int -> (B, size) int."""
    return first[:, None] + mx.arange(size)


def pick(x, index):
    """Return x[b, index[b, j]] of every row b: (B, T, ...) and (B, J) int -> (B, J, ...), or (B,) int -> (B, ...)."""
    if x.shape[1] == 1:  # decoding token by token: a view, no gather
        return mx.broadcast_to(x[:, 0] if index.ndim == 1 else x, (*index.shape, *x.shape[2:]))
    # A gather by row: n stays a value, and no shape depends on it.
    rows = mx.arange(x.shape[0])
    return x[rows if index.ndim == 1 else rows[:, None], index]


def after(x, n, before):
    """Return what the first n positions of each row end with: x[b, n[b] - 1], or before[b] where n[b] is 0.

    x (B, T, ...), n (B,) int, before (B, ...).
    """
    some = (n > 0).reshape(-1, *(1,) * (before.ndim - 1))
    # Where n is 0 the clamped index picks a row that `where` drops.
    return mx.where(some, pick(x, mx.maximum(n - 1, 0)), before)


def ends(documents, n, size):
    """Return the last `size` positions of each row, when n of T are kept, and which are in the last's document.

    documents (B, size + T) int begin with the positions before; n (B,) int. Returns (B, size) int and bool.
    """
    index = span(n, size)
    ids = pick(documents, index)
    return index, ids == ids[:, -1:]


def tail(x, index, same, empty):
    """Return x (B, size + T, ...) at its `ends`, `empty` where they are not the `same` document: (B, size, ...)."""
    return mx.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), pick(x, index), empty)


def scan(decay, drive, start, exact):
    """Return h (B, T, C): h_t = decay_t * h_{t-1} + drive_t, h_{-1} = start (B, C); float32 or wider, T from 1 up."""
    return (recurrence.reference if exact else recurrence.scan)(decay, drive, start)


def softcap(x, cap, exact):
    """Return cap * tanh(x / cap)."""
    return cap * mx.tanh(x / cap)


def cross_entropy(logits, targets, exact, cap=None, bias=None):
    """Return (-log softmax(z)[target], logsumexp(z)): logits (..., V) and targets (...) int -> (...) and (...).

    z is softcap(logits + bias, cap), bias (V,) or None; uncapped where cap is None; float32 or wider.
    """
    # A probability needs more digits than 16 bits have.
    logits = logits.astype(mx.float32) if logits.dtype.size == 2 else logits
    logits = logits if bias is None else logits + bias
    logits = logits if cap is None else softcap(logits, cap, exact)
    total = logsumexp(logits, exact)
    return total - mx.squeeze(mx.take_along_axis(logits, targets[..., None], axis=-1), -1), total


def hash32(key, index):
    """Return core.rng.hash32(key, index) on the device: int and (n,) uint32 -> (n,) uint32."""
    x = index ^ mx.array(key, mx.uint32)
    # Two rounds of shift and multiply, as core.rng has them: every bit of the index reaches every bit of the result.
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)
