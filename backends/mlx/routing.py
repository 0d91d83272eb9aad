"""Which experts a token is sent to, and products of rows that are sorted by expert, in MLX; the PyTorch file's twin.

Shapes are those of the settings, whatever tokens want. N rows (a token for each expert that it is sent to), E experts,
M blocks of Q rows, I and O channels in and out.
"""

from typing import Any, NamedTuple

import mlx.core as mx

BLOCK = 64
"""Rows of a block, at most: a product of so many is about as fast as one of all."""


class Blocks(NamedTuple):
    """Where rows lie when those of each expert fill blocks of their own."""

    row: Any  # (M * Q,) int: the row at each place, -1 where there is none
    place: Any  # (N,) int: the place of each row
    owner: Any  # (M,) int: the expert of each block, rising; the last expert's, too, of those that nobody needs


def ranks(p):
    """Return how many come before each in the order of falling p, equal ones by index: (..., E) -> (..., E) int32."""
    index, this, other = mx.arange(p.shape[-1]), p[..., :, None], p[..., None, :]
    # By comparison: no sort promises what it does with equal ones. Numbers that are none come by index too, else one
    # step that overflowed would send its tokens to experts that do not exist.
    before = mx.where(index < index[:, None], ~(this > other), other > this)
    return mx.stop_gradient(mx.sum(before.astype(mx.int32), axis=-1))  # MLX: gather_mm asks for it


def blocks(expert_N, count):
    """Return the Blocks of rows by their experts, of `count`."""
    rows = expert_N.shape[0]
    size = 1 << (max(1, min(BLOCK, rows // count)).bit_length() - 1)
    total = -(-rows // size) + count  # every expert may leave a block half empty
    mine_NE = (expert_N[:, None] == mx.arange(count)).astype(mx.int32)
    end_E = mx.cumsum((mx.sum(mine_NE, axis=0) + size - 1) // size)
    before_N = mx.sum(mx.cumsum(mine_NE, axis=0) * mine_NE, axis=1) - 1
    begin_E = mx.concatenate([mx.zeros_like(end_E[:1]), end_E[:-1]]) * size
    place_N = mx.sum(begin_E * mine_NE, axis=1) + before_N
    row = mx.full((total * size,), -1, dtype=mx.int32)
    row[place_N] = mx.arange(rows, dtype=mx.int32)
    owner_M = mx.sum((mx.arange(total)[:, None] >= end_E).astype(mx.int32), axis=1)
    return Blocks(row, place_N, mx.minimum(owner_M, count - 1))


def moved(x, there, back) -> Any:
    """Return x[there], of -1 any row; `back` is the way back, which gradients take, 0 for -1: gathers both ways."""

    @mx.custom_function
    def move(x):
        return x[mx.maximum(there, 0)]

    @move.vjp
    def backwards(x, grad, _):
        # What lies where there is no row gets no gradient, and so gives none to weights.
        return mx.where((back >= 0)[:, None], grad[mx.maximum(back, 0)], mx.array(0.0, grad.dtype))

    return move(x)


def products(x, weight, owner_M):
    """Return each block times its expert's weight: (M * Q, I) and (E, O, I) -> (M * Q, O)."""
    kept, x = x.dtype, x.reshape(len(owner_M), -1, x.shape[-1])
    if mx.default_device() == mx.Device(mx.cpu):  # MLX: there gather_mm is for float32 alone
        x = x.astype(mx.float32)
    weight = mx.swapaxes(weight.astype(x.dtype), -1, -2)
    y = mx.gather_mm(x, weight, rhs_indices=owner_M, sorted_indices=True)
    return y.reshape(-1, y.shape[-1]).astype(kept)
