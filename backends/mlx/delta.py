"""The gated delta rule in MLX: S <- g S, d = beta (v - S^T k), S <- S + k d^T, o = S^T q, for every head.

In a chunk the d of all tokens solve a unit-triangular system, exactly: d_t lacks what the tokens before it wrote.
Letters: B rows, T positions, H heads, K channels of a key, V of a value, N chunks of C positions.
"""

from typing import Any

import mlx.core as mx

from backends.mlx import ops
from core.model.delta import CHUNK


def rule(q, k, v, beta, decay, documents, start, exact):
    """Return what is read, o (B, T, H, V), and what is written, d (B, T, H, V); float32 or wider.

    q and k (B, T, H, K), v (B, T, H, V), beta and decay (B, T, H), the logarithm of g; start (B, H, K, V): the state
    before the first token, of document 0; documents (B, T) int: a state begins anew where the number changes.
    """
    form = recurrent if q.shape[1] == 1 else chunked
    return form(q, k, v, beta, decay, documents, start, exact)


def recurrent(q, k, v, beta, decay, documents, start, exact):
    """Return what `rule` does by the definition, one position after the other."""
    before_BT = mx.concatenate([mx.zeros_like(documents[:, :1]), documents[:, :-1]], axis=1)
    g_BTH = mx.where((documents == before_BT)[..., None], ops.exp(decay, exact), 0.0)
    state_BHKV, read, written = start, [], []
    for t in range(q.shape[1]):
        state_BHKV = g_BTH[:, t, :, None, None] * state_BHKV
        known_BHV = mx.squeeze(k[:, t, :, None] @ state_BHKV, 2)
        d_BHV = beta[:, t, :, None] * (v[:, t] - known_BHV)
        state_BHKV = state_BHKV + k[:, t, ..., None] * d_BHV[..., None, :]
        read.append(mx.squeeze(q[:, t, :, None] @ state_BHKV, 2))
        written.append(d_BHV)
    return mx.stack(read, axis=1), mx.stack(written, axis=1)


def chunked(q, k, v, beta, decay, documents, start, exact):
    """Return what `rule` does, chunk by chunk: products of matrices, and one step from each chunk to the next."""
    rows, seq, heads, width = k.shape
    size = min(CHUNK, seq)
    count = -(-seq // size)

    def split(x):
        """Return x in chunks, (B, N, C, ...); what lies past the end is 0, writes nothing and is read by nobody."""
        x = mx.pad(x, [(0, 0), (0, count * size - seq), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(rows, count, size, *x.shape[2:])

    q_BNHCK, k_BNHCK, v_BNHCV = (mx.swapaxes(split(x), 2, 3) for x in (q, k, v))
    beta_BNHC1, decay_BNHC1 = (mx.swapaxes(split(x), 2, 3)[..., None] for x in (beta, decay))
    documents_BNC = split(documents)
    same_XCC = ops.causal_mask(size, size, documents_BNC.reshape(-1, size))
    same_BN1CC = same_XCC.reshape(rows, count, 1, size, size)
    # Logarithms summed from the document's first token in the chunk, and from behind s to t. By masks, so that no bit
    # of another document comes in; as sums, as differences of sums that a strong decay is in have no digits left.
    decay_BNHCC = mx.where(same_BN1CC, mx.swapaxes(decay_BNHC1, -1, -2), 0.0)
    sum_BNHC1 = mx.sum(decay_BNHCC, axis=-1, keepdims=True)
    behind_CC = mx.tri(size, k=-1, dtype=decay.dtype)
    gap_BNHCC = mx.where(same_BN1CC, decay_BNHCC @ behind_CC, mx.array(ops.MASKED, decay.dtype))
    ratio_BNHCC = ops.exp(gap_BNHCC, exact)  # what is left at t of what s wrote
    # What is left of the state that entered the chunk: nothing once a document has begun.
    ends_BN1 = documents_BNC[:, :, -1:]
    entered_BN1 = mx.concatenate([mx.zeros_like(ends_BN1[:, :1]), ends_BN1[:, :-1]], axis=1)
    open_BN1C1 = (documents_BNC == entered_BN1)[:, :, None, :, None]
    left_BNHC1 = mx.where(open_BN1C1, ops.exp(sum_BNHC1, exact), 0.0)
    written_BNHCK = beta_BNHC1 * k_BNHCK
    solved_BNHCC: Any = solve(mx.tril(ratio_BNHCC * (written_BNHCK @ mx.swapaxes(k_BNHCK, -1, -2)), -1))
    # d = u - w S: the state that enters the chunk may come later.
    u_BNHCV, w_BNHCK = solved_BNHCC @ (beta_BNHC1 * v_BNHCV), solved_BNHCC @ (left_BNHC1 * written_BNHCK)
    state_BNHKV: Any = start[:, None]
    if count > 1:
        kept_BNHKC = mx.swapaxes(k_BNHCK, -1, -2) * ratio_BNHCC[..., -1:, :]
        step_BNHKK = left_BNHC1[..., -1:, :] * unit(width, k) - kept_BNHKC @ w_BNHCK
        state_BNHKV = states(step_BNHKK, kept_BNHKC @ u_BNHCV, start)
    d_BNHCV = u_BNHCV - w_BNHCK @ state_BNHKV
    scores_BNHCC = ratio_BNHCC * (q_BNHCK @ mx.swapaxes(k_BNHCK, -1, -2))
    o_BNHCV = (left_BNHC1 * q_BNHCK) @ state_BNHKV + scores_BNHCC @ d_BNHCV

    def joined(x_BNHCV):
        return mx.swapaxes(x_BNHCV, 2, 3).reshape(rows, count * size, heads, -1)[:, :seq]

    return joined(o_BNHCV), joined(d_BNHCV)


def unit(size, like):
    """Return the unit matrix (size, size)."""
    at = mx.arange(size)
    return (at[:, None] == at).astype(like.dtype)


@mx.custom_function
def states(step, add, start):
    """Return the state that enters each chunk, (B, N, H, K, V): S_n+1 = step_n S_n + add_n, from start on."""
    out = [start]
    for n in range(step.shape[1] - 1):
        out.append(mx.addmm(add[:, n], step[:, n], out[-1]))
    return mx.stack(out, axis=1)


@states.vjp
def _states_gradients(primals, grad, out):
    """By the same recurrence backwards: an autograd would make a whole array of zeros for every chunk's slice."""
    step, _, start = primals
    last = step.shape[1] - 1
    deltas = [mx.zeros_like(start), grad[:, last]]  # nothing follows the last chunk
    for n in range(last - 1, -1, -1):
        deltas.append(mx.addmm(grad[:, n], mx.swapaxes(step[:, n], -1, -2), deltas[-1]))
    following = mx.stack(deltas[-2::-1], axis=1)
    return following @ mx.swapaxes(out, -1, -2), following, deltas[-1]


@mx.custom_function
def solve(a):
    """Return the inverse of 1 + a, a (..., C, C) strictly lower, exactly, in about 2 log C products.

    Blocks of twice the size from blocks: [[X, 0], [Y, Z]]^-1 = [[X^-1, 0], [-Z^-1 Y X^-1, Z^-1]]. The series
    1 - a + a^2 - ... is exact too, but its terms grow beyond all digits where keys are alike (docs/model.md).
    """
    at, size = mx.arange(a.shape[-1]), 1
    inverse = mx.broadcast_to(unit(a.shape[-1], a), a.shape)
    while size < a.shape[-1]:
        block = at // size
        below = mx.where((block[:, None] == block + 1) & (block % 2 == 0), a, 0.0)
        inverse = inverse - (below if size == 1 else inverse @ below @ inverse)
        size *= 2
    return inverse


@solve.vjp
def _solve_gradient(primal, grad, inverse):
    """By the rule of the inverse: two products instead of those of every size of blocks."""
    turned = mx.swapaxes(inverse, -1, -2)
    return -mx.tril(turned @ grad @ turned, -1)
