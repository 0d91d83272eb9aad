"""Our kernels at the sizes of full-size presets: outputs and gradients against the exact ops in float64, and speed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from backends.cuda import ops
from core.check.tolerances import P1_FAST, P2_BFLOAT16
from shared_tests.device.child import Child
from shared_tests.device.plan import COPY

Tensors = dict[str, torch.Tensor]
SCANS = ((64, 1024, 512), (8, 1024, 512), (64, 64, 12_288))
"""(rows, positions, channels): mixers at 64 and 8 rows, capsules."""
LOSSES = ((30.0, "bfloat16"), (10.0, "bfloat16"), (None, "bfloat16"), (30.0, "float32"))
"""(cap, type) of logits (65,536, 8,192)."""
SLICE = 4096
"""Rows of logits that the exact op gets at a time: float64 takes four times the memory."""


def run(child: Child) -> None:
    """Check and time both kernels."""
    from backends.cuda.kernels.cross_entropy import cross_entropy
    from backends.cuda.kernels.scan import scan

    device = torch.device("cuda" if child.gpu else "cpu")
    if not child.gpu and (why := _not_interpreted(scan)):
        child.text("kernels", f"needs a GPU: Triton's interpreter does not run here ({why})")
        return
    for size in SCANS if child.gpu else ((2, 17, 40), (1, 5, 32)):
        with child.part(f"scan {size}"):
            _scan(child, scan, size, device)
    for cap, dtype in LOSSES if child.gpu else LOSSES[::2]:
        with child.part(f"cross-entropy, cap {cap}, {dtype}"):
            _loss(child, cross_entropy, (65_536, 8192) if child.gpu else (6, 1500), cap, getattr(torch, dtype), device)


def _not_interpreted(scan: Callable) -> str:
    """Return why Triton's interpreter cannot run a kernel at all: that of Triton 3.6 fails with numpy from 2.4 on."""
    try:
        scan(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1))
    except Exception as error:  # of the interpreter's own type, and only it is known here
        if type(error).__name__ != "InterpreterError":
            raise
        return str(error)[:100]
    return ""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let fresh memory hold NaN: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gap(ours: torch.Tensor, exact: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """Return the relative RMS of a result against the exact one, or against `size`."""
    norm = torch.linalg.vector_norm
    return float(norm((ours.double() - exact).flatten()) / norm((exact if size is None else size).flatten()))


def _scan(child: Child, scan: Callable, size: tuple[int, int, int], device: torch.device) -> None:
    random = torch.Generator(device).manual_seed(sum(size))
    rows, seq, channels = size
    draw = [torch.randn(s, generator=random, device=device) for s in (size, size, (rows, channels), size)]
    decay = torch.sigmoid(3 * draw[0])
    decay[:, 1 :: max(2, seq // 8)] = 0  # documents begin
    leaves = [x.requires_grad_() for x in (decay, draw[1], draw[2])]
    with poisoned():
        h = scan(*leaves)
        grads = torch.autograd.grad(h, leaves, draw[3], retain_graph=True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = ops.scan(exact[0], exact[1], exact[2], True)
    wanted = [wanted.detach(), *torch.autograd.grad(wanted, exact, draw[3].double())]
    for what, a, b in zip(("h", "d decay", "d drive", "d start"), (h.detach(), *grads), wanted, strict=True):
        child.check(f"scan {size}: {what}", gap(a, b), P1_FAST)
    bytes_ = 4 * rows * seq * channels
    with torch.no_grad():
        _timed(child, f"scan {size}, forward", lambda: scan(*leaves), 3 * bytes_)
    _timed(
        child, f"scan {size}, backward", lambda: torch.autograd.grad(h, leaves, draw[3], retain_graph=True), 5 * bytes_
    )


def _loss(
    child: Child, loss: Callable, size: tuple[int, int], cap: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    random, name = torch.Generator(device).manual_seed(7), f"cross-entropy, cap {cap}, {str(dtype)[6:]}"
    logits = (torch.randn(size, generator=random, device=device) * (cap or 10.0)).to(dtype).requires_grad_()
    targets = torch.randint(size[1], size[:1], generator=random, device=device, dtype=torch.int32)
    weights = [torch.randn(size[0], generator=random, device=device) for _ in range(2)]
    with poisoned():
        found = loss(logits, targets, cap)
        (grad,) = torch.autograd.grad(found, logits, weights, retain_graph=True)
    whole = _exact(logits.detach(), targets, weights, cap)
    largest = max(whole.values(), key=torch.linalg.vector_norm)  # -log p(target) is as good as the logsumexp is
    for what, a in zip(whole, found, strict=True):
        child.check(f"{name}: {what}", gap(a.detach(), whole[what], largest if what == "nll" else None), P1_FAST)
    limit = P2_BFLOAT16 if dtype == torch.bfloat16 else P1_FAST
    worst = max(gap(grad[at], part) for at, part in _gradients(logits.detach(), targets, weights, cap))
    child.check(f"{name}: gradient, worst {SLICE} rows", worst, limit)
    bytes_ = logits.numel() * logits.element_size()
    with torch.no_grad():
        _timed(child, f"{name}, forward", lambda: loss(logits, targets, cap), bytes_)
    backward: Any = lambda: torch.autograd.grad(found, logits, weights, retain_graph=True)  # noqa: E731
    _timed(child, f"{name}, backward", backward, 2 * bytes_)


def _slices(logits: torch.Tensor, targets: torch.Tensor, cap: float | None) -> Iterator[tuple[slice, Any]]:
    """Yield the exact op's leaf and outputs for some rows at a time."""
    for begin in range(0, len(logits), SLICE):
        at = slice(begin, begin + SLICE)
        leaf = logits[at].double().requires_grad_()
        yield at, (leaf, ops.cross_entropy(leaf if cap is None else ops.softcap(leaf, cap, True), targets[at], True))


def _exact(logits: torch.Tensor, targets: torch.Tensor, weights: list[torch.Tensor], cap: float | None) -> Tensors:
    with torch.no_grad():
        made = [out for _, (_, out) in _slices(logits, targets, cap)]
    return {"nll": torch.cat([out[0] for out in made]), "logsumexp": torch.cat([out[1] for out in made])}


def _gradients(
    logits: torch.Tensor, targets: torch.Tensor, weights: list[torch.Tensor], cap: float | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    for at, (leaf, out) in _slices(logits, targets, cap):
        yield at, torch.autograd.grad(out, leaf, [w[at].double() for w in weights])[0]


def _timed(child: Child, what: str, work: Callable[[], Any], bytes_: int) -> None:
    """Write a time, and the bytes that must move in it as a share of what a copy moves."""
    with child.alone():
        time = child.figure(what, child.milliseconds(work), "ms")
    rate, copy = bytes_ / time / 1e6, child.earlier("ceilings", COPY)
    child.figure(f"{what}: bytes that must move", rate, "GB/s" + (f", {rate / copy:.0%} of a copy" if copy else ""))
