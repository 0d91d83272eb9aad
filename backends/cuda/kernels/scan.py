"""The diagonal linear recurrence h_t = d_t * h_{t-1} + u_t as Triton kernels: forward and all three gradients.

Importing this file needs triton; its kernels run on a CUDA device, or under TRITON_INTERPRET=1 on the CPU.
Shapes: B rows, T positions, C channels.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]: no wheel for macOS
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch.autograd.function import Function, once_differentiable

# A program walks the T positions of one row for BLOCK channels, and every step waits for the one before: only many
# programs, each with many loads under way, fill the memory. 32 channels are one warp, which reads whole lines of 128
# bytes and never waits for another warp. 8 rows of 512 channels make 128 programs, about one for each multiprocessor of
# an H100 or H200 (132); 64 rows make 1024, all resident at once. Wider blocks would leave multiprocessors idle.
BLOCK = 32
WARPS = 1
# The loads of this many steps overlap: one load should take as long as some ten steps' 40 to 60 instructions. They wait
# in shared memory, two (forward) or three (backward) lines a step: under 6 KB a program, so the 32 a multiprocessor
# holds fit. All of this is reckoned from the compiled code; nothing has been timed.
STAGES = 16


@triton.jit(do_not_specialize=["T"])
def forward_kernel(decay, drive, start, out, T, C, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Write h to out; all tensors contiguous, the grid (B, C / BLOCK rounded up)."""
    row = tl.program_id(0).to(tl.int64)  # B * T * C may pass 2^31
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < C
    h = tl.load(start + row * C + channel, live)
    # Each pointer moves by itself: an offset that loads and stores share would be kept in registers for every stage.
    decay += row * T * C + channel
    drive += row * T * C + channel
    out += row * T * C + channel
    for _ in tl.range(0, T, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        h = tl.load(decay, live) * h + tl.load(drive, live)
        tl.store(out, h, live)
        decay += C
        drive += C
        out += C


@triton.jit(do_not_specialize=["T"])
def backward_kernel(grad, decay, h, start, d_decay, d_drive, d_start, T, C, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Write the gradients of decay, drive and start, from T - 1 down to 0; tensors and grid as in forward_kernel."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < C
    before = tl.load(start + row * C + channel, live)
    later = tl.zeros_like(before)  # d_{t+1} delta_{t+1}
    last = (row + 1) * T * C - C + channel
    grad += last
    decay += last
    h += last - C  # h_{t-1}; h_{-1} is start
    d_decay += last
    d_drive += last
    step = -C
    for _ in tl.range(1, T, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        delta = tl.load(grad, live) + later
        later = tl.load(decay, live) * delta
        tl.store(d_drive, delta, live)
        tl.store(d_decay, delta * tl.load(h, live), live)
        grad += step
        decay += step
        h += step
        d_decay += step
        d_drive += step
    delta = tl.load(grad, live) + later
    tl.store(d_drive, delta, live)
    tl.store(d_decay, delta * before, live)
    tl.store(d_start + row * C + channel, tl.load(decay, live) * delta, live)


class Scan(Function):
    """delta_t = g_t + d_{t+1} delta_{t+1} gives d(drive)_t; d(decay)_t = delta_t h_{t-1}; d(start) = d_0 delta_0."""

    @staticmethod
    def forward(ctx, decay, drive, start):
        rows, seq, channels = drive.shape
        out = torch.empty_like(drive)
        launch: Any = forward_kernel[(rows, triton.cdiv(channels, BLOCK))]
        launch(decay, drive, start, out, seq, channels, BLOCK, STAGES, num_warps=WARPS)
        ctx.save_for_backward(decay, out, start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        decay, h, start = ctx.saved_tensors
        rows, seq, channels = h.shape
        grads = torch.empty_like(decay), torch.empty_like(h), torch.empty_like(start)
        launch: Any = backward_kernel[(rows, triton.cdiv(channels, BLOCK))]
        launch(grad.contiguous(), decay, h, start, *grads, seq, channels, BLOCK, STAGES, num_warps=WARPS)
        return grads


def scan(decay, drive, start):
    """Return h (B, T, C) with h_t = decay_t * h_{t-1} + drive_t and h_{-1} = start.

    decay, drive (B, T, C), start (B, C), T and C at least 1, of any strides: all float32 or all float64, on one device.
    Anything else is a ValueError.
    """
    given = (decay, drive, start)
    alike = drive.dtype in (torch.float32, torch.float64) and len({(x.dtype, x.device) for x in given}) == 1
    shaped = drive.ndim == 3 and decay.shape == drive.shape and start.shape == (drive.shape[0], drive.shape[2])
    if not (alike and shaped and min(drive.shape[1:]) >= 1):
        got = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in given)
        raise ValueError(
            "scan needs decay and drive (B, T, C) and start (B, C), T and C at least 1, all float32 or all float64, "
            f"on one device; got {got}"
        )
    return Scan.apply(decay.contiguous(), drive.contiguous(), start.contiguous())
