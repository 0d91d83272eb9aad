"""What the device can do at most: products of the shapes that steps have, copies, Newton-Schulz on real stacks."""

import contextlib
import functools
from collections import Counter

import torch

from core import presets
from core.model.params import param_table
from shared_tests.device.child import Child
from shared_tests.device.plan import COPY, SQUARE

SHAPES = ((65_536, 768, 2688), (65_536, 768, 512), (65_536, 256, 8192), (65_536, 254, 8192), (65_536, 512, 1024))
"""(rows, inner, columns) of products of full-size presets: MLP, mixer, head, head of an odd width, baseline's MLP."""
PRESETS = ("skc_8xh100", "baseline", "ternary_74m")


def run(child: Child) -> None:
    """Measure them."""
    device, small = torch.device("cuda" if child.gpu else "cpu"), 1 if child.gpu else 32
    with child.alone():
        for rows, inner, columns in ((8192, 8192, 8192), *SHAPES):
            a = torch.randn(rows // small, inner, device=device, dtype=torch.bfloat16)
            b = torch.randn(inner, columns, device=device, dtype=torch.bfloat16)
            time = child.milliseconds(functools.partial(torch.matmul, a, b), 20)
            what = SQUARE if rows == 8192 else f"bfloat16 product {rows} x {inner} x {columns}"
            child.figure(what, 2 * len(a) * inner * columns / time / 1e9, "TFLOP/s")
        source = torch.empty((1 << 30) // small**2, dtype=torch.uint8, device=device)
        time = child.milliseconds(functools.partial(torch.empty_like(source).copy_, source))
        child.figure(COPY, 2 * source.numel() / time / 1e6, "GB/s")
        for name in PRESETS if child.gpu else ("tiny",):
            for kind in ("float32", "TF32", "bfloat16"):
                with child.part(f"{name}, {kind}"):
                    given = stacks(name, device, torch.bfloat16 if kind == "bfloat16" else torch.float32)
                    with products_in("high" if kind == "TF32" else "highest"):
                        time = child.milliseconds(functools.partial(products, given), 5)
                    child.figure(f"{name}: five rounds of Newton-Schulz on all of its matrices, {kind}", time, "ms")


@contextlib.contextmanager
def products_in(precision: str):
    """Multiply float32 in a precision of torch's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def stacks(name: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return random stacks of the shapes of a preset's matrices, each with its short side first."""
    rows = param_table(presets.get(name).config.model).values()
    shapes = Counter(tuple(sorted(row.shape)) for row in rows if row.group == "matrix")
    return [torch.randn(count, *shape, device=device).to(dtype) / 30 for shape, count in shapes.items()]


def products(given: list[torch.Tensor]) -> None:
    """Do the products of five rounds, without what is between them."""
    for x in given:
        for _ in range(5):
            gram = x @ x.mT
            torch.baddbmm(x, gram @ gram, x, beta=0.5, alpha=1e-4)
