"""Softcapped cross-entropy as Triton kernels: the capped logits and the probabilities are never written to memory.

Importing this file needs triton; its kernels run on a CUDA device, or under TRITON_INTERPRET=1 on the CPU.
Shapes: N rows, V vocabulary, P programs of the backward pass.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]: no wheel for macOS
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch.autograd.function import Function, once_differentiable

# One program per row: a micro-batch has thousands, enough to fill every multiprocessor. 1,024 logits at a time are 8 a
# thread, of 4 warps. Reckoned, not timed.
BLOCK = 1024
WARPS = 4
# The bias's gradient sums columns of the logits' gradient before that is rounded. A program walks so many rows for each
# block of columns and writes a partial sum per column; those are summed after it: no atomics, the same bits each time.
# 65,536 rows make 2,048 programs, as many as an H100 holds at once, and partial sums of 1/16 of the logits in bfloat16.
BIASED_ROWS = 32


@triton.jit
def capped(x, CAP: tl.constexpr):
    """Return CAP * tanh(x / CAP) and its slope; where there is no cap, x and 1."""
    slope = tl.zeros_like(x) + 1
    if CAP is not None:
        small = tl.exp(-2 * tl.abs(x) / CAP)  # at most 1: nothing overflows
        high = CAP * (1 - small) / (1 + small)
        x = tl.where(x < 0, -high, high)
        slope = 4 * small / ((1 + small) * (1 + small))  # 1 - tanh^2 would cancel
    return x, slope


@triton.jit
def forward_kernel(
    logits, bias, targets, nll, total, V, CAP: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write -log p(target) and the logsumexp of each row; all tensors contiguous, the grid (N,)."""
    wide = total.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # N * V may pass 2^31
    logits += row * V
    top = tl.full((), float("-inf"), wide)
    mass = tl.zeros((), wide)  # sum of exp(x - top) so far
    for start in range(0, V, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits + place, place < V, 0.0).to(wide)
        if BIASED:
            x += tl.load(bias + place, place < V, 0.0)
        x, _ = capped(x, CAP)
        x = tl.where(place < V, x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 0))
        mass = mass * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    hit = tl.load(logits + target, inside, float("nan")).to(wide)  # the step's guard sees the NaN
    if BIASED:
        hit += tl.load(bias + target, inside, 0.0)
    hit, _ = capped(hit, CAP)
    lse = top + tl.log(mass)
    tl.store(total + row, lse)
    tl.store(nll + row, lse - hit)


@triton.jit
def backward_kernel(
    grad_nll, grad_total, logits, bias, targets, total, out, d_bias, N, V,
    CAP: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits before bias and cap, and partial sums of the bias's to d_bias (P, V).

    Tensors as in forward_kernel; program p of the grid (P,) has the rows from p * ROWS on.
    """
    wide = total.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS  # N * V may pass 2^31
    d_bias += tl.program_id(0).to(tl.int64) * V
    for start in range(0, V, BLOCK):
        place = start + tl.arange(0, BLOCK)
        shift = tl.load(bias + place, place < V, 0.0) if BIASED else tl.zeros((BLOCK,), wide)
        column = tl.zeros((BLOCK,), wide)
        for row in range(first, tl.minimum(first + ROWS, N)):
            ours = tl.load(grad_nll + row)
            both = ours + tl.load(grad_total + row)
            y = capped(tl.load(logits + row * V + place, place < V, 0.0).to(wide) + shift, CAP)
            slope = tl.exp(y[0] - tl.load(total + row)) * both
            slope -= tl.where(place == tl.load(targets + row), ours, 0.0)
            dx = slope * y[1]
            column += dx
            tl.store(out + row * V + place, dx.to(out.dtype.element_ty), place < V)
        if BIASED:
            tl.store(d_bias + place, column, place < V)


class CrossEntropy(Function):
    """dx = (softmax * (g_nll + g_total) - onehot * g_nll) (1 - tanh^2((x + bias) / cap)); d(bias) sums it over rows."""

    @staticmethod
    def forward(ctx, logits, targets, cap, bias):
        rows, vocab = logits.shape
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        nll, total = (torch.empty(rows, dtype=wide, device=logits.device) for _ in range(2))
        ctx.cap, ctx.biased = cap, bias is not None
        shift = targets if bias is None else bias  # without a bias nothing reads it
        launch: Any = forward_kernel[(rows,)]
        launch(logits, shift, targets, nll, total, vocab, cap, ctx.biased, BLOCK, num_warps=WARPS)
        ctx.save_for_backward(logits, targets, total, shift)
        return nll, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, grad_total):  # pyright: ignore
        logits, targets, total, shift = ctx.saved_tensors
        rows, vocab = logits.shape
        out = torch.empty_like(logits)
        each = BIASED_ROWS if ctx.biased else 1
        programs = triton.cdiv(rows, each)
        columns = total.new_empty((programs, vocab)) if ctx.biased else total
        given = grad_nll.contiguous(), grad_total.contiguous(), logits, shift, targets, total, out, columns
        launch: Any = backward_kernel[(programs,)]
        launch(*given, rows, vocab, ctx.cap, ctx.biased, each, BLOCK, num_warps=WARPS)
        return out, None, None, torch.sum(columns, 0) if ctx.biased else None


def cross_entropy(logits, targets, cap, bias=None):
    """Return (-log p(target), logsumexp) of cap * tanh((logits + bias) / cap), or of logits + bias where cap is None.

    logits (..., V) bfloat16, float32 or float64, targets (...) int32 or int64 below V, bias (V,) or None, on one
    device; results, arithmetic and bias are float32, of float64 logits float64. Anything else is a ValueError; a
    target outside gives NaN.
    """
    floats, ints = (torch.bfloat16, torch.float32, torch.float64), (torch.int32, torch.int64)
    typed = logits.dtype in floats and targets.dtype in ints and logits.device == targets.device
    shaped = logits.ndim > 0 and logits.shape[:-1] == targets.shape and logits.shape[-1] >= 1
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shifted = bias is None or (bias.shape, bias.dtype, bias.device) == (logits.shape[-1:], wide, logits.device)
    if not (typed and shaped and shifted):
        given = (logits, targets) if bias is None else (logits, targets, bias)
        got = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in given)
        raise ValueError(
            "cross_entropy needs logits (..., V) in bfloat16, float32 or float64, V at least 1, targets (...) in int32 "
            f"or int64, and a bias (V,) in float32, of float64 logits in float64, or none, on one device; got {got}"
        )
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    nll, total = CrossEntropy.apply(flat, targets.reshape(-1).contiguous(), cap, bias)
    return nll.reshape(targets.shape), total.reshape(targets.shape)
