"""The quantisers on a device: whether eager and compiled bits are the CPU's, for every storage class; their time."""

from collections.abc import Callable
from typing import Any

import torch

from backends.cuda import storage
from core.storage import STORAGES
from shared_tests.device.child import Child

CASTS = {"emulate_precision_casts": True}
"""Keeps the roundings to float16 that inductor leaves out otherwise."""
DIVISION = {"eager_numerics.division_rounding": True}
"""torch 2.13: divide as IEEE says."""


def run(child: Child) -> None:
    """Compare the bits of 5 million weights, among them ties, zeros and very large and small rows."""
    size = (2048, 2560) if child.gpu else (64, 320)
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(size, generator=random) * 0.02
    weight[:8] *= torch.tensor([0.0, 1e-7, 1e-3, 1e4, 1.0, 1.0, 1.0, 1.0])[:, None]
    weight[4:6] = torch.round(weight[4:6] * 256) / 256
    there = weight.to("cuda" if child.gpu else "cpu")
    for name in STORAGES:
        with child.part(name):
            here, eager = storage.stored(weight, name), storage.stored(there, name)
            child.check(f"{name}: values that differ from the CPU's", different(eager, here), 0)
            with child.alone():
                child.figure(f"{name}: eager", child.milliseconds(lambda n=name: storage.stored(there, n), 10), "ms")
    if child.only_gpu("compiled"):
        from torch._inductor import config

        known = hasattr(getattr(config, "eager_numerics", None), "division_rounding")
        for name in STORAGES:
            with child.part(f"{name}, compiled"):
                compiled(child, name, there, CASTS, "casts kept")
        for name in ("int8/row", "int6/row", "int4/row", "fp8/row") if known else ():
            with child.part(f"{name}, compiled, division rounded"):
                compiled(child, name, there, CASTS | DIVISION, "casts kept, division rounded")


def compiled(child: Child, name: Any, weight: torch.Tensor, options: dict[str, Any], how: str) -> None:
    """Write how many values a compiled quantiser gets differently, and its time: figures, no checks."""
    made: Callable = torch.compile(lambda w: storage.stored(w, name), dynamic=False, options=options)
    eager = storage.stored(weight, name)
    child.figure(f"{name}, compiled, {how}: values that differ", different(made(weight), eager), "values")
    with child.alone():
        child.figure(f"{name}, compiled, {how}", child.milliseconds(lambda: made(weight), 10), "ms")


def different(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return how many values have other bits."""
    bits = [x.cpu().contiguous().view(torch.int32) for x in (a, b)]
    return int(torch.sum(bits[0] != bits[1]))
