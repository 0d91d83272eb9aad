"""Forms of attention on the heads of full-size presets: gaps to ours, speed, and what empty spans cost."""

import dataclasses
from collections.abc import Callable

import torch

from backends.cuda import attention, ops
from core import presets
from core.check.tolerances import P2_BFLOAT16
from core.config import ModelConfig
from shared_tests.device.child import Child

HEADS = ("skc_8xh100", "ternary_74m")
"""Presets: 12 heads of 64 channels, 4 shared; 8 of 96, 4 shared."""
ROWS, SEQ = 64, 1024
SPANS = (2112, 576, 320, 192)
"""Room for spans: one in 32 tokens, in 128, in 256, and about as many as there are."""


def run(child: Child) -> None:
    """Check every form that is there, then time it."""
    device = torch.device("cuda" if child.gpu else "cpu")
    for name in HEADS:
        for documents in ("isolated", "packed"):
            model = dataclasses.replace(presets.get(name).config.model, documents=documents)
            with child.part(f"{name}, {documents}"):
                _gaps(child, f"{name}, {documents}", model, device)
    if child.only_gpu("speed"):
        for name in HEADS:
            model = presets.get(name).config.model
            with child.part(f"{name}, spans"):
                _spans(child, name, model, device)
            with child.part(f"{name}, whole rows"):
                _rows(child, name, dataclasses.replace(model, documents="packed"), device)


def _gaps(child: Child, name: str, model: ModelConfig, device: torch.device) -> None:
    seq = SEQ if child.gpu else 64
    ours = attention.gaps(None, model, torch.bfloat16, device, seq=seq)
    child.check(f"{name}: torch's, worst of output and gradients", max(ours.values()), P2_BFLOAT16)
    for form in attention.CANDIDATES:
        _, found = attention.trial(form, model, "bfloat16", device, seq)
        if isinstance(found, str):
            child.text(f"{name}: {form}", found)
        else:
            child.check(f"{name}: {form}, worst of output and gradients", max(found.values()), P2_BFLOAT16)


def _heads(model: ModelConfig, device: torch.device) -> list[torch.Tensor]:
    counts = (model.attention.heads, model.attention.kv_heads, model.attention.kv_heads)
    draws = (
        torch.randn(ROWS, n, SEQ, model.attention.width(model), device=device, dtype=torch.bfloat16) for n in counts
    )
    return [x.requires_grad_() for x in draws]


def _timed(child: Child, what: str, attend: Callable, given: list[torch.Tensor]) -> None:
    """Write the time of a form forward, and of its backward pass."""
    with child.part(what), child.alone():
        with torch.no_grad():
            child.figure(f"{what}, forward", child.milliseconds(lambda: attend(*given)), "ms")
        out = attend(*given)
        grad = torch.randn_like(out)
        backward = child.milliseconds(lambda: torch.autograd.grad(out, given, grad, retain_graph=True))
        child.figure(f"{what}, backward", backward, "ms")


def _documents(device: torch.device) -> torch.Tensor:
    """Return document numbers (ROWS, SEQ): about as many documents as 65,536 tokens of FineWeb have."""
    begins = torch.zeros(ROWS * SEQ, dtype=torch.bool, device=device)
    begins[torch.randperm(ROWS * SEQ, device=device)[:95]] = True
    return torch.cumsum(begins.reshape(ROWS, SEQ), dim=1, dtype=torch.int32)


def _places(documents: torch.Tensor, most: int) -> torch.Tensor:
    """Return where each of `most` spans begins: of documents and rows, then empty ones at the end."""
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    begins = torch.cat([first, documents[:, 1:] != documents[:, :-1]], dim=1).flatten().nonzero().flatten()
    made = torch.full((most + 1,), documents.numel(), dtype=torch.int32, device=documents.device)
    made[: len(begins)] = begins.to(torch.int32)
    return made


def _spans(child: Child, name: str, model: ModelConfig, device: torch.device) -> None:
    given, documents = _heads(model, device), _documents(device)
    for form, candidate in attention.CANDIDATES.items():
        if attention.trial(form, model, "bfloat16", device, SEQ)[0] is None:
            continue
        made = candidate.make()
        for most in SPANS if made.spans else ():
            at = attention.Spans(_places(documents, most), SEQ)
            _timed(
                child, f"{name}: {form}, {most} spans", lambda q, k, v, m=made, a=at: m.attend(q, k, v, a, False), given
            )
    mask = ops.causal_mask(SEQ, SEQ, documents)
    _timed(child, f"{name}: torch's with a mask", lambda q, k, v: ops.attention(q, k, v, mask, False), given)


def _rows(child: Child, name: str, model: ModelConfig, device: torch.device) -> None:
    given = _heads(model, device)
    for form, candidate in attention.CANDIDATES.items():
        if attention.trial(form, model, "bfloat16", device, SEQ)[0] is not None:
            made = candidate.make()
            _timed(child, f"{name}: {form}, whole rows", lambda q, k, v, m=made: m.attend(q, k, v, None, False), given)
    _timed(child, f"{name}: torch's, whole rows", lambda q, k, v: ops.attention(q, k, v, None, False), given)
