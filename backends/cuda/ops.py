"""The ops of the model in PyTorch. Same names and signatures as backends/mlx/ops.py.

`exact` picks the composed form, which mirrors MLX's float64-safe one; the fast forms are the framework's own, or have
hand-written gradients (fused.py).
Shapes: B rows, T positions, S key positions, H heads, G key/value heads, K channels of a head, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F

from backends.cuda import scan as recurrence
from backends.cuda.fused import CrossEntropy, Decay, Orthogonal, RMSNorm, Softcap, SquaredLeaky
from core.model.ngrams import XOR_MULTIPLIERS

MASKED = -1e30
"""Score of a hidden key: its weight underflows to exactly 0, and no inf - inf can arise."""


def exp(x, exact):
    """Return e^x."""
    return torch.exp(x)  # CUDA: good to the last bit in float64, so both forms are one


def softmax(x, exact):
    """Return the softmax over the last axis."""
    if not exact:
        return torch.softmax(x, dim=-1)
    # The largest cancels, so that nothing overflows; its gradient cancels too, which is why it is stopped.
    weights = exp(x - torch.amax(x, dim=-1, keepdim=True).detach(), exact)
    return weights / torch.sum(weights, dim=-1, keepdim=True)


def logsumexp(x, exact):
    """Return log(sum(exp(x))) over the last axis."""
    if not exact:
        return torch.logsumexp(x, dim=-1)
    top = torch.amax(x, dim=-1, keepdim=True).detach()
    return top.squeeze(-1) + torch.log(torch.sum(exp(x - top, exact), dim=-1))


def embedding(tokens, weight):
    """Return rows of weight (V, E) by token: (B, T) int -> (B, T, E)."""
    return F.embedding(tokens, weight)


def linear(x, weight):
    """Return x @ weight.T; weight is (out, in), cast to x's type."""
    return F.linear(x, weight.to(x.dtype))


def rms_norm(x, eps, exact, gain=None):
    """Return x / sqrt(mean(x^2) + eps) over the last axis, computed in float32 for bfloat16 input, times gain (D,)."""
    gain = None if gain is None else gain.to(x.dtype)
    if not exact and x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), gain, eps)
    if not exact:
        return RMSNorm.apply(x, eps) if gain is None else RMSNorm.apply(x, eps) * gain
    # A mean of squares over a thousand channels needs more than bfloat16's eight bits.
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * torch.rsqrt(torch.mean(torch.square(wide), dim=-1, keepdim=True) + eps)).to(x.dtype)
    return normed if gain is None else normed * gain


def rope(x, cos, sin):
    """Rotate the first 2 * cos.shape[-1] channels, half-split, by +angle: (x1 cos - x2 sin, x1 sin + x2 cos).

    x (B, H, T, K); cos and sin (T, R / 2).
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest], dim=-1)


def document_ids(tokens, bos):
    """Return the number of BOS tokens up to and including each position: (B, T) int -> (B, T) int32."""
    return torch.cumsum((tokens == bos).to(torch.int32), dim=-1, dtype=torch.int32)


def causal_mask(queries, keys, documents):
    """Return which keys each query may see: True where key <= query, aligned bottom-right, and in one document.

    queries, keys: counts T <= S; documents: (B, S) int of the keys, or None. Returns (T, S), or (B, 1, T, S).
    """
    device = None if documents is None else documents.device
    # Counted from the end: the keys of a state stand in front, and are all in the past.
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = torch.arange(keys, device=device)[None, :] <= query
    if documents is None:
        return mask
    same = documents[:, keys - queries :, None] == documents[:, None, :]
    return torch.logical_and(same, mask)[:, None]


def attention(q, k, v, mask, exact):
    """Return softmax(q k^T / sqrt(K), hidden keys left out) v, each key/value head shared by H / G query heads.

    q (B, H, T, K), k and v (B, G, S, K), mask from `causal_mask`, or None: causal over the whole row (T = S only).
    """
    rows, heads, queries, width = q.shape
    shared, keys = k.shape[1], k.shape[2]
    if mask is None and queries != keys:
        raise ValueError(f"attention without a mask needs as many queries as keys, got {queries} and {keys}")
    if not exact:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=width**-0.5, enable_gqa=shared != heads
        )
    mask = causal_mask(queries, keys, None).to(q.device) if mask is None else mask
    grouped = q.reshape(rows, shared, heads // shared, queries, width)
    scores = grouped @ torch.swapaxes(k, -1, -2)[:, :, None] * width**-0.5
    scores = torch.where(mask if mask.ndim == 2 else mask[:, :, None], scores, MASKED)
    return (softmax(scores, exact) @ v[:, :, None]).reshape(rows, heads, queries, width)


def exclude(y, v, alone, projected):
    """Return y - v, each v shared by H / G heads, or, if `projected`, y without its part along v; 0 where `alone`.

    y (B, T, H, K), v (B, T, G, K), alone (B, T) bool: tokens of which y is v, exactly 0 then and without a gradient.
    """
    rows, seq, shared, width = v.shape
    # A norm behind it multiplies gradients of nothing by 1 / sqrt(eps): y's and v's would cancel, their rounding not.
    y, v, alone = y.reshape(rows, seq, shared, -1, width), v[..., None, :], alone[..., None, None, None]
    left = Orthogonal.apply(y, v, alone) if projected else (y - v).masked_fill(alone, 0.0)
    return left.reshape(rows, seq, -1, width)


def relu2(x, exact):
    """Return max(x, 0)^2."""
    return torch.square(torch.relu(x)) if exact else SquaredLeaky.apply(x, 0.0)


def leaky_relu2(x, exact):
    """Return LeakyReLU(x, slope 0.5)^2."""
    return torch.square(F.leaky_relu(x, 0.5)) if exact else SquaredLeaky.apply(x, 0.5)


def sigmoid(x, exact):
    """Return 1 / (1 + e^-x)."""
    return torch.sigmoid(x)  # CUDA: good to the last bit in float64, so both forms are one


def silu(x, exact):
    """Return x / (1 + e^-x)."""
    return x * sigmoid(x, exact) if exact else F.silu(x)


def softplus(x, exact):
    """Return log(1 + e^x)."""
    # CUDA: good to the last bit in float64, so both forms are one; F.softplus is x from 20 on
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))


def decay(x, exact):
    """Return d = 1 / (1 + e^x) and the drive's scale sqrt(1 - d^2 + 1e-6), which keeps a unit input's variance at 1.

    1 - d^2 is (1 - d)(1 + d) with 1 - d = 1 / (1 + e^-x): nothing cancels when d is close to 1.
    """
    if not exact:
        return Decay.apply(x)
    d = sigmoid(-x, exact)
    # The 1e-6 bounds the root's gradient where d is 1.
    return d, torch.sqrt(sigmoid(x, exact) * (1 + d) + 1e-6)


def hadamard(x, matrix):
    """Return x @ matrix, a Walsh-Hadamard matrix (symmetric), cast to x's type: (..., C) -> (..., C)."""
    return x @ matrix.to(x.dtype)


def ngram_buckets(ids, documents, multipliers, buckets):
    """Return core.model.ngrams.ngram_buckets on the device: rows of the stacked tables, -1 where nothing counts.

    ids and documents (B, P + T) int, of which P positions come before; multipliers[order][head]. Returns (B, T, tables)
    int32.
    """
    before = len(multipliers)
    # An id of -1 stands for no token: hashed as 0, then masked.
    seq, safe = ids.shape[1] - before, torch.clamp(ids, min=0).to(torch.int64)  # CUDA: torch has no uint32 products
    here, rows, live = documents[:, before:], [], ids[:, before:] >= 0
    for order, heads in enumerate(multipliers, 1):
        oldest = slice(before - order, before - order + seq)
        live = live & (ids[:, oldest] >= 0) & (documents[:, oldest] == here)
        for p in heads:
            h = torch.zeros_like(safe[:, before:])
            for lag in range(order, -1, -1):
                h = (h * (p % buckets) + safe[:, before - lag : before - lag + seq]) % buckets
            rows.append(torch.where(live, h + len(rows) * buckets, -1))
    return torch.stack(rows, dim=-1).to(torch.int32)


def xor_buckets(ids, documents, buckets):
    """Return the row of the table that every pair reads by the hash xor, the last where the pair does not count.

    ids and documents (B, 1 + T) int, of which one position comes before. Returns (B, T, 1) int32.
    """
    # int64 holds the products of ids up to 65,535, the largest that are hashed; int32 ends at 36,313 * 59,138.
    safe, last = torch.clamp(ids, min=0).to(torch.int64), buckets - 1  # CUDA: torch has no uint32 products
    newer, older = XOR_MULTIPLIERS
    rows = ((safe[:, 1:] * newer) ^ (safe[:, :-1] * older)) % last
    live = (ids[:, 1:] >= 0) & (ids[:, :-1] >= 0) & (documents[:, 1:] == documents[:, :-1])
    return torch.where(live, rows, last)[..., None].to(torch.int32)


def hashed_rows(table, rows):
    """Return rows of `table` (R, W) side by side: (B, T, N) int -> (B, T, N * W), zeros where the index is -1.

    A row that is all zero was pruned: it gets no gradient and stays zero.
    """
    picked = F.embedding(torch.clamp(rows, min=0), table)
    # A zero row would else be moved by its gradient, and the artifact would have to store it.
    live = (rows >= 0)[..., None] & torch.any(picked != 0, dim=-1, keepdim=True)
    return torch.where(live, picked, 0.0).reshape(*rows.shape[:2], -1)


def short_conv(x, weight, documents):
    """Return sum_i weight[:, i] * x_{t-i} over the taps i whose position is in t's document.

    x (B, P + T, C) and documents (B, P + T) int begin with the P = taps - 1 positions before; weight (C, taps), column
    0 is the current token. Returns (B, T, C).
    """
    taps = weight.shape[1]
    seq, weight = x.shape[1] - taps + 1, weight.to(x.dtype)
    here = documents[:, taps - 1 :]
    y = weight[:, 0] * x[:, taps - 1 :]
    # Lag by lag, each masked by its own document: zeroing at the start of a document alone would let older taps in.
    for i in range(1, taps):
        part = slice(taps - 1 - i, taps - 1 - i + seq)
        y = y + weight[:, i] * torch.where((documents[:, part] == here)[..., None], x[:, part], 0.0)
    return y


def span(first, size):
    """Return first[b] + 0, 1, ... of every row b: (B,) int -> (B, size) int."""
    return first[:, None] + torch.arange(size, device=first.device)


def pick(x, index):
    """Return x[b, index[b, j]] of every row b: (B, T, ...) and (B, J) int -> (B, J, ...), or (B,) int -> (B, ...)."""
    if x.shape[1] == 1:  # decoding token by token: a view, no gather
        return torch.broadcast_to(x[:, 0] if index.ndim == 1 else x, (*index.shape, *x.shape[2:]))
    # A gather by row: n stays a value, and no shape depends on it.
    rows = torch.arange(x.shape[0], device=x.device)
    return x[rows if index.ndim == 1 else rows[:, None], index]


def after(x, n, before):
    """Return what the first n positions of each row end with: x[b, n[b] - 1], or before[b] where n[b] is 0.

    x (B, T, ...), n (B,) int, before (B, ...).
    """
    some = (n > 0).reshape(-1, *(1,) * (before.ndim - 1))
    # Where n is 0 the clamped index picks a row that `where` drops.
    return torch.where(some, pick(x, torch.clamp(n - 1, min=0)), before)


def ends(documents, n, size):
    """Return the last `size` positions of each row, when n of T are kept, and which are in the last's document.

    documents (B, size + T) int begin with the positions before; n (B,) int. Returns (B, size) int and bool.
    """
    index = span(n, size)
    ids = pick(documents, index)
    return index, ids == ids[:, -1:]


def tail(x, index, same, empty):
    """Return x (B, size + T, ...) at its `ends`, `empty` where they are not the `same` document: (B, size, ...)."""
    return torch.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), pick(x, index), empty)


def scan(decay, drive, start, exact):
    """Return h (B, T, C): h_t = decay_t * h_{t-1} + drive_t, h_{-1} = start (B, C); float32 or wider, T from 1 up."""
    return (recurrence.reference if exact else recurrence.scan)(decay, drive, start)


def softcap(x, cap, exact):
    """Return cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap) if exact else Softcap.apply(x, cap)


def cross_entropy(logits, targets, exact, cap=None, bias=None):
    """Return (-log softmax(z)[target], logsumexp(z)): logits (..., V) and targets (...) int -> (...) and (...).

    z is softcap(logits + bias, cap), bias (V,) or None; uncapped where cap is None; float32 or wider.
    """
    if logits.is_cuda and not exact:  # CUDA: one kernel, as in scan.py
        from backends.cuda.kernels.cross_entropy import cross_entropy as kernel

        return kernel(logits, targets, cap, bias)
    # A probability needs more digits than bfloat16 has.
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    logits = logits if bias is None else logits + bias
    logits = logits if cap is None else softcap(logits, cap, exact)
    if not exact:
        return CrossEntropy.apply(logits, targets)
    total = logsumexp(logits, exact)
    return total - torch.gather(logits, -1, targets[..., None].long()).squeeze(-1), total


def hash32(key, index):
    """Return core.rng.hash32(key, index) on the device: int and (n,) uint32 -> (n,) uint32."""
    low = 0xFFFFFFFF  # CUDA: torch has no uint32 products; int64 products wrap, and their low 32 bits are right
    # Two rounds of shift and multiply, as core.rng has them: every bit of the index reaches every bit of the result.
    x = index.to(torch.int64) ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return (x ^ (x >> 16)).to(torch.uint32)
