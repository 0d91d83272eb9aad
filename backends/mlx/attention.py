"""MLX: the form of attention, chosen once when an engine is built: one for training, one for scoring.

MLX's own attention is fused where it scores on a GPU; while gradients are traced it writes all scores, those of hidden
keys too. The reference of every form here is ops.attention's exact one.
Shapes: B rows, T queries, S keys, H heads, G key/value heads, R = H / G, K channels of a head.
"""

import functools
from typing import Any, NamedTuple

import mlx.core as mx

from backends.mlx import ops

BLOCK, BLOCKS = {True: 256, False: 128}, 8
"""Fewest queries of a block, on a GPU or not; most blocks of a row: small ones skip more keys, and launch more."""
RECOMPUTED = 2048
"""Queries from which on the backward pass makes the scores again, a block at a time, instead of keeping them."""


class Forms(NamedTuple):
    """How an engine computes attention: functions that are called like ops.attention."""

    training: Any
    scoring: Any
    note: str


def choose(exact, gpu):
    """Return the forms of an engine, and what there is to say of them."""
    if exact:
        return Forms(ops.attention, ops.attention, "attention: exact, composed")
    blocks = f"block-causal, backward scores recomputed from {RECOMPUTED:,} tokens on"
    training = functools.partial(attention, least=BLOCK[gpu])
    if not gpu:
        return Forms(training, training, f"attention: {blocks}")
    fused = "mx.fast.scaled_dot_product_attention (on Metal fused for heads of 64, 80 and 128 channels)"
    return Forms(training, ops.attention, f"attention: training {blocks}; scoring {fused}")


def rope(x, context, settings, exact):
    """Return ops.rope of x (B, H, T, K); in half precision MLX's own, which is one kernel and makes its own tables.

    In float32 its angles are off by the rounding of position times frequency, 1e-5 at 256, so the host's tables stay.
    """
    if exact or x.dtype in (mx.float32, mx.float64) or not settings.rope_dims:
        return ops.rope(x, context.cos, context.sin)
    first = 0 if context.position is None else context.position
    return mx.fast.rope(x, settings.rope_dims, traditional=False, base=settings.rope_base, scale=1.0, offset=first)


def attention(q, k, v, mask, exact, least, recomputed=RECOMPUTED):
    """Return what ops.attention does, a block of queries at a time, each with the keys up to its own end.

    Blocks have `least` queries or more; from `recomputed` queries on the backward pass makes the scores again.
    """
    rows, heads, queries, width = q.shape
    shared, keys = k.shape[1], k.shape[2]
    if mask is None and queries != keys:
        raise ValueError(f"attention without a mask needs as many queries as keys, got {queries} and {keys}")
    again = queries >= recomputed
    size = least if again else max(least, -(-queries // BLOCKS))  # made again, a block is as small as it may be
    ends = [min(start + size, queries) for start in range(0, queries, size)]
    spans = [(start, end, keys - queries + end) for start, end in zip([0, *ends], ends, strict=False)]
    grouped = q.reshape(rows, shared, heads // shared, queries, width)
    hidden = [_hidden(mask, span, heads // shared, q.dtype) for span in spans]
    out = _blocks(spans, hidden, again)(grouped, k * width**-0.5, v)
    return _joined(out[: len(spans)], heads // shared).reshape(rows, heads, queries, width)


def _hidden(mask, span, repeats, dtype):
    """Return what is added to the last scores of a block: the type's least number where a key is hidden, else 0.

    Of shape (B or 1, 1, R * block, keys) for a mask of documents, else (R * block, block): what is before is all seen.
    """
    start, end, last = span
    seen = ops.causal_mask(end - start, end - start, None) if mask is None else mask[..., start:end, :last]
    least = mx.where(seen, mx.array(0.0, dtype), mx.array(mx.finfo(dtype).min, dtype))
    return mx.concatenate([least] * repeats, axis=-2)


def _split(x, spans):
    """Return the blocks of queries of x (B, G, R, T, K), each with its R heads below one another: (B, G, R * T', K)."""
    blocks = (x[..., start:end, :] for start, end, _ in spans)
    return [block.reshape(*x.shape[:2], -1, x.shape[-1]) for block in blocks]


def _joined(blocks, repeats):
    """Return the inverse of _split."""
    return mx.concatenate([x.reshape(*x.shape[:2], repeats, -1, x.shape[-1]) for x in blocks], axis=3)


def _blocks(spans, hidden, again) -> Any:
    """Return a function of (q, k, v) to the output of every block, and, if not `again`, its weights."""

    def weights(q, k, i):
        keys, least = mx.swapaxes(k[:, :, : spans[i][2]], -1, -2), hidden[i]
        whole = least.shape[-1] == keys.shape[-1]
        scores = mx.addmm(least, q, keys) if whole else (q @ keys).at[..., -least.shape[-1] :].add(least)
        return mx.softmax(scores, axis=-1, precise=True)

    @mx.custom_function
    def forward(q, k, v):
        outputs, kept = [], []
        for i, block in enumerate(_split(q, spans)):
            if again and outputs:  # MLX evaluates in an order of its own: all blocks' scores might live at once
                block = mx.depends(block, outputs[-1])
            p = weights(block, k, i)
            outputs.append(p @ v[:, :, : spans[i][2]])
            kept.append(p)
        return outputs if again else outputs + kept

    @forward.vjp
    def backward(primals, grads, results):
        q, k, v = primals
        wide, count, before = mx.float64 if q.dtype == mx.float64 else mx.float32, len(spans), []
        moved, dk, dv = [], [], []
        for i, block in enumerate(_split(q, spans)):
            last, grad, out = spans[i][2], grads[i], results[i]
            if again:  # nor may they be made before the gradient is there, or be taken for those of the forward pass
                block = mx.depends(block, [grad, *before])
            p = weights(block, k, i) if again else results[count + i]
            slope = (grad @ mx.swapaxes(v[:, :, :last], -1, -2)).astype(wide)
            # The mean slope of a query's weights is its output times its gradient: a sum of K, not of S, products.
            mean = mx.sum(grad.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
            ds = (p.astype(wide) * (slope - mean)).astype(q.dtype)
            moved.append(ds @ k[:, :, :last])
            dk.append(mx.swapaxes(ds, -1, -2) @ block)
            dv.append(mx.swapaxes(p, -1, -2) @ grad)
            before = [moved[-1], dk[-1], dv[-1]]
        return _joined(moved, q.shape[2]), _summed(dk, spans), _summed(dv, spans)

    return forward


def _summed(parts, spans):
    """Return the sum of parts of which each reaches as far as its block's keys: (B, G, S', K) -> (B, G, S, K)."""
    edges = [0, *(last for _, _, last in spans)]
    pieces: list[mx.array] = []
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        pieces.append(functools.reduce(mx.add, [part[:, :, a:b] for part in parts[i:]]))
    return mx.concatenate(pieces, axis=2)
