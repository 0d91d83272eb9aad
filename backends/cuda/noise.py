"""Noise of a training step: integers of the hash that the host has too, so that twins, ranks and micro-batches agree.

Letters: S passes through layers, B rows, N weights of one shape (O, I).
"""

import torch

from backends.cuda import ops


def kept(key, first, rows, drop, keys_S2):
    """Return the factors of mixer and MLP in each pass and row, (S, 2, B): 0 where it is left out, else 1 / (1 - p).

    p rises in a straight line to `drop` in the last pass; the rows are those from `first` on of the step's.
    """
    passes = keys_S2.shape[0]
    p_S11 = (drop * (torch.arange(1, passes + 1, device=key.device).to(drop.dtype) / passes))[:, None, None]
    drawn_S2B = ops.hash32(key ^ keys_S2[..., None], first + torch.arange(rows, device=key.device)).long()
    return torch.where(drawn_S2B >= (p_S11 * 2.0**32).long(), 1 / (1 - p_S11), torch.zeros_like(p_S11))


def of_weights(key, keys_N, shape, scale):
    """Return `scale` times the centred sums of four random bytes of every value of N weights: (N, O, I)."""
    index_I = torch.arange(shape[0] * shape[1], device=key.device)
    drawn = ops.hash32(key ^ keys_N[:, None], index_I).long()
    total = drawn & 255
    for bits in (8, 16, 24):
        total = total + ((drawn >> bits) & 255)
    return ((total.to(scale.dtype) - 510) * scale).view(-1, *shape)
