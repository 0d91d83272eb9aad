"""The quantisers on a device: whether eager and compiled bits are the CPU's, for every storage class; their time."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from backends.cuda import storage
from core.model.storage import STORAGES
from shared_tests.device.child import Child

CASTS = {"emulate_precision_casts": True}
"""Keeps the roundings to float16 that inductor leaves out otherwise."""
DIVISION = ("eager_numerics.division_rounding", "emulate_divison_rounding")
"""Inductor's option that divides as IEEE says, by its names of several versions."""
DIVIDED = ("int8/row", "int7/row", "int6/row", "int5/row", "int4/row", "fp8/row")
"""Classes that divide by their scale; ternary compares."""
RULES: list[Any] = [(name, None) for name in STORAGES] + [("int6/row", 12.85), ("int5/64", 6.2)]
"""Storage and deviation."""


def run(child: Child) -> None:
    """Compare the bits of 5 million weights, among them ties, zeros and very large and small rows."""
    size = (2048, 2560) if child.gpu else (64, 320)
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(size, generator=random) * 0.02
    weight[:8] *= torch.tensor([0.0, 1e-7, 1e-3, 1e4, 1.0, 1.0, 1.0, 1.0])[:, None]
    weight[4:6] = torch.round(weight[4:6] * 256) / 256
    there, forms = weight.to("cuda" if child.gpu else "cpu"), {}
    for rule in RULES:
        words = in_words(*rule)
        with child.part(words):
            forms[f"{words}, eager"] = functools.partial(storage.stored, there, *rule)
            gaps = different(storage.stored(there, *rule), storage.stored(weight, *rule))
            child.check(f"{words}: values that differ from the CPU's", gaps, 0)
    if child.only_gpu("compiled"):
        known = [option for option in DIVISION if option in torch._inductor.list_options()][:1]
        for name, deviation in RULES:
            for options in (CASTS, CASTS | {known[0]: True}) if known and name in DIVIDED else (CASTS,):
                what = f"{in_words(name, deviation)}, compiled with {', '.join(options)}"
                with child.part(what):
                    forms[what] = compiled(child, what, (name, deviation), there, options)
    child.turn()
    with child.alone():
        for what, work in forms.items():
            child.figure(what, child.milliseconds(work, 10), "ms")


def in_words(name: str, deviation: float | None) -> str:
    """Return a rule of storage in words."""
    return name + (f" by {deviation} deviations" if deviation else "")


def compiled(child: Child, what: str, rule: Any, weight: torch.Tensor, options: Any) -> Callable[[], Any]:
    """Return a compiled quantiser; write how many values it gets differently: a figure, for the engine looks itself."""
    made: Callable = torch.compile(lambda w: storage.stored(w, *rule), dynamic=False, options=options)
    child.figure(f"{what}: values that differ", different(made(weight), storage.stored(weight, *rule)), "values")
    return functools.partial(made, weight)


def different(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return how many values have other bits."""
    bits = [x.cpu().contiguous().view(torch.int32) for x in (a, b)]
    return int(torch.sum(bits[0] != bits[1]))
