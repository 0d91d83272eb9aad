"""The diagonal recurrence h_t = d_t h_{t-1} + u_t in MLX: products and sums only, any length, float32 or wider.

No division by cumulative products and no exp of differences of sums: an underflow just gives 0.
Shapes: B rows, T positions, C channels, K chunks of W positions.
"""

import mlx.core as mx

from backends.mlx.kernels import scan as kernels
from backends.mlx.kernels import trusted

CHUNK = 32
"""Positions W of a chunk: all chunks go through their W positions together, then their ends follow one another."""


def reference(decay, drive, start):
    """Return h (B, T, C) by the definition, one position after the other; decay, drive (B, T, C), start (B, C)."""
    state, states = start, []
    for t in range(drive.shape[1]):
        state = decay[:, t] * state + drive[:, t]
        states.append(state)
    return mx.stack(states, axis=1)


def chunked(decay, drive, start, backwards=False):
    """Return what `reference` does, without gradients; backwards: from the last position to the first."""
    rows, seq, width = drive.shape
    size = min(CHUNK, seq)
    count = -(-seq // size)
    if count * size > seq:  # decay 0 and drive 0: what lies past the end adds nothing
        padding = [(0, 0), (0, count * size - seq), (0, 0)]
        decay, drive = mx.pad(decay, padding), mx.pad(drive, padding)
    shape = (rows, count, size, width)
    decay, drive = decay.reshape(shape), drive.reshape(shape)
    order, chunks = list(range(size)), list(range(count))
    if backwards:
        order.reverse()
        chunks.reverse()
    entries = start[:, None]
    if count > 1:  # what each chunk makes of nothing, and of what enters it
        ends, whole = drive[:, :, order[0]], decay[:, :, order[0]]
        for w in order[1:]:
            ends, whole = drive[:, :, w] + decay[:, :, w] * ends, whole * decay[:, :, w]
        entering = [start] * count
        for k, following in zip(chunks, chunks[1:], strict=False):
            entering[following] = ends[:, k] + whole[:, k] * entering[k]
        entries = mx.stack(entering, axis=1)
    last, states = entries, [entries] * size
    for w in order:
        last = drive[:, :, w] + decay[:, :, w] * last
        states[w] = last
    return mx.stack(states, axis=2).reshape(rows, count * size, width)[:, :seq]


@mx.custom_function
def _scan(decay, drive, start):
    return kernels.forward(decay, drive, start) if trusted("scan", drive) else chunked(decay, drive, start)


@_scan.vjp
def _gradients(primals, grad, states):
    decay, _, start = primals
    if trusted("scan", grad):
        return kernels.backward(decay, states, start, grad)
    following = mx.concatenate([decay[:, 1:], mx.zeros_like(decay[:, :1])], axis=1)
    delta = chunked(following, grad, mx.zeros_like(start), backwards=True)
    before = mx.concatenate([start[:, None], states[:, :-1]], axis=1)
    return before * delta, delta, decay[:, 0] * delta[:, 0]


def scan(decay, drive, start):
    """Return what `reference` does, with the gradients of a recurrence that runs backwards.

    delta_t = g_t + d_{t+1} delta_{t+1}; du = delta, dd_t = delta_t h_{t-1}, dstart = d_0 delta_0: nothing is kept but
    decays and states. On a GPU one kernel forward, one backward.
    """
    return _scan(decay, drive, start)
