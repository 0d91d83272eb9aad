"""Which experts a token is sent to, and products of rows that are sorted by expert, in PyTorch; the MLX file's twin.

Shapes are those of the settings, whatever tokens want. N rows (a token for each expert that it is sent to), E experts,
M blocks of Q rows, I and O channels in and out.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

BLOCK = 64
"""Rows of a block, at most: a product of so many is about as fast as one of all."""


class Blocks(NamedTuple):
    """Where rows lie when those of each expert fill blocks of their own."""

    row: Any  # (M * Q,) int: the row at each place, -1 where there is none
    place: Any  # (N,) int: the place of each row
    owner: Any  # (M,) int: the expert of each block, rising; unused ones are the last expert's


def ranks(p):
    """Return how many come before each in the order of falling p, equal ones by index: (..., E) -> (..., E) int32."""
    index, this, other = torch.arange(p.shape[-1], device=p.device), p[..., :, None], p[..., None, :]
    # By comparison: no sort promises what it does with equal ones.
    before = (other > this) | ((other == this) & (index < index[:, None]))
    return torch.sum(before, dim=-1, dtype=torch.int32)


def blocks(expert_N, count):
    """Return the Blocks of rows by their experts, of `count`."""
    rows, device = expert_N.shape[0], expert_N.device
    size = 1 << (max(1, min(BLOCK, rows // count)).bit_length() - 1)
    total = -(-rows // size) + count  # every expert may leave a block half empty
    mine_NE = (expert_N[:, None] == torch.arange(count, device=device)).to(torch.int32)
    end_E = torch.cumsum((torch.sum(mine_NE, dim=0) + size - 1) // size, dim=0)
    before_N = torch.sum(torch.cumsum(mine_NE, dim=0) * mine_NE, dim=1) - 1
    begin_E = torch.cat([torch.zeros_like(end_E[:1]), end_E[:-1]]) * size
    place_N = torch.sum(begin_E * mine_NE, dim=1) + before_N
    row = torch.full((total * size,), -1, dtype=torch.int64, device=device)
    row = row.scatter(0, place_N, torch.arange(rows, device=device))
    owner_M = torch.sum(torch.arange(total, device=device)[:, None] >= end_E, dim=1)
    return Blocks(row, place_N, torch.clamp(owner_M, max=count - 1))


def moved(x, there, back):
    """Return x[there], zeros where that is -1; `back` is the way back, which gradients take: gathers both ways."""
    return Moved.apply(x, there, back)


class Moved(Function):
    """y = x[there]; dx = g[back]."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return _picked(x, there)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        return _picked(grad, *ctx.saved_tensors), None, None


def _picked(x, index):
    return torch.index_select(x, 0, torch.clamp(index, min=0)).masked_fill_((index < 0)[:, None], 0.0)


def products(x, weight, owner_M):
    """Return each block times its expert's weight: (M * Q, I) and (E, O, I) -> (M * Q, O)."""
    weight, blocks = weight.to(x.dtype), len(owner_M)
    if not x.is_cuda:
        return torch.ops.skc.products(x, weight, owner_M)
    ends = torch.searchsorted(owner_M, torch.arange(len(weight), device=x.device), right=True) * (len(x) // blocks)
    return torch._grouped_mm(x, weight.transpose(-1, -2), offs=ends.to(torch.int32))


# CUDA: products on a CPU, where torch._grouped_mm fails for an expert without rows; a tracer sees one operation.


@torch.library.custom_op("skc::products", mutates_args=())
def _products(x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    y, size = x.new_empty(len(x), weight.shape[1]), len(x) // len(owner)
    for i, expert in enumerate(owner.tolist()):
        # Block by block, of one shape: no row's rounding depends on how many others its expert has.
        part = slice(i * size, (i + 1) * size)
        torch.mm(x[part], weight[expert].T, out=y[part])
    return y


@torch.library.custom_op("skc::outer_products", mutates_args=())
def _outer_products(grad: Tensor, x: Tensor, owner: Tensor, count: int) -> Tensor:
    out, size, owners = x.new_zeros(count, grad.shape[1], x.shape[1]), len(x) // len(owner), owner.tolist()
    for expert in set(owners):
        begin = owners.index(expert) * size
        part = slice(begin, begin + owners.count(expert) * size)
        torch.mm(grad[part].T, x[part], out=out[expert])
    return out


@_products.register_fake
def _(x, weight, owner):
    return x.new_empty(len(x), weight.shape[1])


@_outer_products.register_fake
def _(grad, x, owner, count):
    return x.new_empty(count, grad.shape[1], x.shape[1])


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    x, weight, owner = ctx.saved_tensors
    grad = grad.contiguous()
    dx = torch.ops.skc.products(grad, weight.transpose(1, 2), owner)
    return dx, torch.ops.skc.outer_products(grad, x, owner, len(weight)), None


_products.register_autograd(_gradients, setup_context=_keep)
