"""Softcapped cross-entropy as Triton kernels: the capped logits and the probabilities are never written to memory.

Importing this file needs triton; its kernels run on a CUDA device, or under TRITON_INTERPRET=1 on the CPU.
Shapes: N rows, V vocabulary.
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
def forward_kernel(logits, targets, nll, total, V, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Write -log p(target) and the logsumexp of each row; all tensors contiguous, the grid (N,)."""
    wide = total.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # N * V may pass 2^31
    logits += row * V
    top = tl.full((), float("-inf"), wide)
    mass = tl.zeros((), wide)  # sum of exp(x - top) so far
    for start in range(0, V, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x, _ = capped(tl.load(logits + place, place < V, 0.0).to(wide), CAP)
        x = tl.where(place < V, x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 0))
        mass = mass * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    hit, _ = capped(tl.load(logits + target, inside, float("nan")).to(wide), CAP)  # the step's guard sees the NaN
    lse = top + tl.log(mass)
    tl.store(total + row, lse)
    tl.store(nll + row, lse - hit)


@triton.jit
def backward_kernel(grad_nll, grad_total, logits, targets, total, out, V, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradient of the logits before the cap; tensors and grid as in forward_kernel."""
    wide = total.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    out += row * V
    ours = tl.load(grad_nll + row)
    both = ours + tl.load(grad_total + row)
    lse = tl.load(total + row)
    target = tl.load(targets + row)
    for start in range(0, V, BLOCK):
        place = start + tl.arange(0, BLOCK)
        y = capped(tl.load(logits + place, place < V, 0.0).to(wide), CAP)
        slope = tl.exp(y[0] - lse) * both - tl.where(place == target, ours, 0.0)
        tl.store(out + place, (slope * y[1]).to(out.dtype.element_ty), place < V)


class CrossEntropy(Function):
    """dx = (softmax * (g_nll + g_total) - onehot * g_nll) (1 - tanh^2(x / cap))."""

    @staticmethod
    def forward(ctx, logits, targets, cap):
        rows, vocab = logits.shape
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        nll, total = (torch.empty(rows, dtype=wide, device=logits.device) for _ in range(2))
        ctx.cap = cap
        launch: Any = forward_kernel[(rows,)]
        launch(logits, targets, nll, total, vocab, cap, BLOCK, num_warps=WARPS)
        ctx.save_for_backward(logits, targets, total)
        return nll, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, grad_total):  # pyright: ignore
        logits, targets, total = ctx.saved_tensors
        rows, vocab = logits.shape
        out = torch.empty_like(logits)
        grads = grad_nll.contiguous(), grad_total.contiguous()
        launch: Any = backward_kernel[(rows,)]
        launch(*grads, logits, targets, total, out, vocab, ctx.cap, BLOCK, num_warps=WARPS)
        return out, None, None


def cross_entropy(logits, targets, cap):
    """Return (-log p(target), logsumexp) of cap * tanh(logits / cap), or of the logits as they are where cap is None.

    logits (..., V) bfloat16, float32 or float64, targets (...) int32 or int64 below V, on one device; results and
    arithmetic are float32, of float64 logits float64. Anything else is a ValueError; a target outside gives NaN.
    """
    floats, ints = (torch.bfloat16, torch.float32, torch.float64), (torch.int32, torch.int64)
    typed = logits.dtype in floats and targets.dtype in ints and logits.device == targets.device
    if not (typed and logits.ndim > 0 and logits.shape[:-1] == targets.shape and logits.shape[-1] >= 1):
        got = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (logits, targets))
        raise ValueError(
            "cross_entropy needs logits (..., V) in bfloat16, float32 or float64, V at least 1, and targets (...) in "
            f"int32 or int64, on one device; got {got}"
        )
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    nll, total = CrossEntropy.apply(flat, targets.reshape(-1).contiguous(), cap)
    return nll.reshape(targets.shape), total.reshape(targets.shape)
