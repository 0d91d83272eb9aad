"""The diagonal recurrence h_t = d_t h_{t-1} + u_t in PyTorch: products and sums only, any length, float32 or wider.

No division by cumulative products and no exp of differences of sums: an underflow just gives 0.
Shapes: B rows, T positions, C channels, K chunks of W positions.
"""

import torch
from torch.autograd import Function

CHUNK = 32
"""Positions W of a chunk: all chunks go through their W positions together, then their ends follow one another."""


def reference(decay, drive, start):
    """Return h (B, T, C) by the definition, one position after the other; decay, drive (B, T, C), start (B, C)."""
    state, states = start, []
    for t in range(drive.shape[1]):
        state = decay[:, t] * state + drive[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def chunked(decay, drive, start, backwards=False):
    """Return what `reference` does, without gradients; backwards: from the last position to the first."""
    rows, seq, width = drive.shape
    size = min(CHUNK, seq)
    count = -(-seq // size)
    if count * size > seq:  # decay 0 and drive 0: what lies past the end adds nothing
        padding = (0, 0, 0, count * size - seq)
        decay, drive = torch.nn.functional.pad(decay, padding), torch.nn.functional.pad(drive, padding)
    shape = (rows, count, size, width)
    decays, drives = decay.reshape(shape).unbind(2), drive.reshape(shape).unbind(2)
    order, chunks = list(range(size)), list(range(count))
    if backwards:
        order.reverse()
        chunks.reverse()
    entries = start[:, None]
    if count > 1:  # what each chunk makes of nothing, and of what enters it
        ends, whole = drives[order[0]], decays[order[0]]
        for w in order[1:]:
            ends, whole = torch.addcmul(drives[w], decays[w], ends), whole * decays[w]
        entering = [start] * count
        for k, following in zip(chunks, chunks[1:], strict=False):
            entering[following] = torch.addcmul(ends[:, k], whole[:, k], entering[k])
        entries = torch.stack(entering, dim=1)
    last, states = entries, [entries] * size
    for w in order:
        last = torch.addcmul(drives[w], decays[w], last)
        states[w] = last
    return torch.stack(states, dim=2).reshape(rows, count * size, width)[:, :seq]


class _Scan(Function):
    @staticmethod
    def forward(ctx, decay, drive, start):
        states = chunked(decay, drive, start)
        ctx.save_for_backward(decay, states, start)
        return states

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        decay, states, start = ctx.saved_tensors
        following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        delta = chunked(following, grad, torch.zeros_like(start), backwards=True)
        before = torch.cat([start[:, None], states[:, :-1]], dim=1)
        return before.mul_(delta), delta, decay[:, 0] * delta[:, 0]


def scan(decay, drive, start):
    """Return what `reference` does, with the gradients of a recurrence that runs backwards.

    delta_t = g_t + d_{t+1} delta_{t+1}; du = delta, dd_t = delta_t h_{t-1}, dstart = d_0 delta_0: nothing is kept but
    decays and states.
    """
    if drive.is_cuda:  # CUDA: one kernel; torch's CUDA builds for Linux bring triton with them
        from backends.cuda.kernels.scan import scan as kernel

        return kernel(decay, drive, start)
    return _Scan.apply(decay, drive, start)
