"""Which experts a token is sent to, and products of rows that are sorted by expert, in PyTorch; the MLX file's twin.

Shapes are those of the settings, whatever tokens want. N rows (a token for each expert that it is sent to), E experts,
M blocks of Q rows, I and O channels in and out.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

BLOCK = 128
"""Rows of a block, at most. CUDA: a CPU's products of 64 rows take a tenth longer."""


class Blocks(NamedTuple):
    """Where rows lie when those of each expert fill blocks of their own."""

    row: Any  # (M * Q,) int: the row at each place, -1 where there is none
    place: Any  # (N,) int: the place of each row
    owner: Any  # (M,) int: the expert of each block, rising; E for those that nobody needs


def ranks(p):
    """Return how many come before each in the order of falling p, equal ones by index: (..., E) -> (..., E) int32."""
    index, this, other = torch.arange(p.shape[-1], device=p.device), p[..., :, None], p[..., None, :]
    # By comparison: no sort promises what it does with equal ones. Numbers that are none come by index too, else one
    # step that overflowed would send its tokens to experts that do not exist.
    before = torch.where(index < index[:, None], ~(this > other), other > this)
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
    return Blocks(row, place_N, owner_M)


def moved(x, there, back) -> Any:
    """Return x[there], of -1 any row; `back` is the way back, which gradients take, 0 for -1: gathers both ways."""
    return Moved.apply(x, there, back)


class Moved(Function):
    """y = x[there]; dx = g[back]: what lies where there is no row gets no gradient, and so gives none to weights."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return torch.index_select(x, 0, torch.clamp(there, min=0))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        (back,) = ctx.saved_tensors
        dx = torch.index_select(grad, 0, torch.clamp(back, min=0))
        return dx.masked_fill_((back < 0)[:, None], 0.0), None, None


def products(x, weight, owner_M):
    """Return each block times its expert's weight: (M * Q, I) and (E, O, I) -> (M * Q, O)."""
    weight = weight.to(x.dtype)
    if not x.is_cuda:
        return torch.ops.skc.products(x, weight, owner_M)
    owner_M, count = torch.clamp(owner_M, max=len(weight) - 1), torch.arange(len(weight), device=x.device)
    ends = torch.searchsorted(owner_M, count, right=True) * (len(x) // len(owner_M))
    return torch._grouped_mm(x, weight.transpose(-1, -2), offs=ends.to(torch.int32))  # pyright: ignore


# CUDA: products on a CPU, where torch._grouped_mm fails for an expert without rows; a tracer sees one operation.


def _spans(owner, size):
    """Return expert -> the rows of its blocks."""
    owners = owner.tolist()
    ends = {expert: (i + 1) * size for i, expert in enumerate(owners)}
    return {expert: slice(owners.index(expert) * size, end) for expert, end in ends.items()}


@torch.library.custom_op("skc::products", mutates_args=())
def _products(x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    y, size = x.new_empty(len(x), weight.shape[1]), len(x) // len(owner)
    for expert, rows in _spans(owner, size).items():
        if expert == len(weight):
            y[rows] = 0.0
            continue
        across = weight[expert].T.contiguous()  # once for all blocks
        # Block by block, of one shape: no row's rounding depends on how many others its expert has.
        for begin in range(rows.start, rows.stop, size):
            torch.mm(x[begin : begin + size], across, out=y[begin : begin + size])
    return y


@torch.library.custom_op("skc::product_gradients", mutates_args=())
def _product_gradients(grad: Tensor, x: Tensor, weight: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw, spans = torch.empty_like(x), torch.empty_like(weight), _spans(owner, len(x) // len(owner))
    for expert in range(len(weight)):
        if expert in spans:
            rows = spans[expert]
            torch.mm(grad[rows], weight[expert], out=dx[rows])
            torch.mm(grad[rows].T, x[rows], out=dw[expert])
        else:
            dw[expert] = 0.0
    if len(weight) in spans:
        dx[spans[len(weight)]] = 0.0
    return dx, dw


@_products.register_fake
def _(x, weight, owner):
    return x.new_empty(len(x), weight.shape[1])


@_product_gradients.register_fake
def _(grad, x, weight, owner):
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return *torch.ops.skc.product_gradients(grad.contiguous(), *ctx.saved_tensors), None


_products.register_autograd(_gradients, setup_context=_keep)
