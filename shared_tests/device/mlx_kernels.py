"""MLX's kernels at the sizes of presets: results against the composed forms, and the time of both.

Without a GPU the host's compiler runs their texts, at small sizes.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from backends.mlx import kernels, ops
from backends.mlx.kernels import trial
from core.check.tolerances import P1_FAST
from shared_tests.device.child import Child
from shared_tests.support.host_kernels import installed

SCANS = ((16, 256, 512), (4, 1024, 512), (2, 4096, 512), (16, 16, 32_768))
"""(rows, positions, channels): mixers, and the capsules of 16 blocks."""
CONVOLUTIONS = ((16, 256, 512), (4, 1024, 512))


def run(child: Child) -> None:
    """Say which kernels are used here; check and time them."""
    with contextlib.nullcontext() if child.gpu else installed():
        for op in trial.TRIALS:
            for dtype in trial.AGREES:
                words, name = trial.form(op, dtype), str(dtype).removeprefix("mlx.core.")
                child.text(f"{op}, {name}", words)
                child.check(f"{op}, {name}: passed over", float(words != "kernels"), 0)
        for size in SCANS if child.gpu else ((2, 40, 40),):
            with child.part(f"scan {size}"):
                rows, seq, width = size
                decay, drive, start = (draw(i, *shape) for i, shape in enumerate((size, size, (rows, width))))
                given = [mx.sigmoid(3 + decay) * (draw(4, rows, seq, 1) < 2), drive, start]
                compare(child, f"scan {size}", lambda d, u, start: ops.scan(d, u, start, False), given, P1_FAST)
        for size in CONVOLUTIONS if child.gpu else ((2, 40, 40),):
            for dtype in trial.AGREES:
                with child.part(f"short_conv {size}, {dtype}"):
                    documents = mx.cumsum((draw(6, *size[:2]) > 1.5).astype(mx.int32), axis=1)
                    given = [draw(1, *size).astype(dtype), draw(2, size[2], 4)]
                    convolve: Any = lambda x, w, documents=documents: ops.short_conv(x, w, documents)  # noqa: E731
                    # The composed form rounds every tap and every sum of the weights' gradient.
                    limit = P1_FAST if dtype == mx.float32 else 10 * trial.AGREES[dtype]
                    compare(child, f"short_conv {size}, {str(dtype).removeprefix('mlx.core.')}", convolve, given, limit)


def draw(key: int, *shape: int) -> mx.array:
    """Return standard normals."""
    return mx.random.normal(shape, key=mx.random.key(key))


@contextlib.contextmanager
def composed() -> Iterator[None]:
    """Use no kernel inside."""
    before = set(kernels.TRUSTED)
    kernels.TRUSTED.clear()
    try:
        yield
    finally:
        kernels.TRUSTED.update(before)


def compare(child: Child, name: str, function: Callable, given: list[mx.array], limit: float) -> None:
    """Check an op's output and gradients, and time them, through the kernels and composed."""
    cotangent = draw(9, *function(*given).shape).astype(given[0].dtype)

    def both() -> list[mx.array]:
        out, grads = mx.vjp(function, given, [cotangent])
        return [*out, *grads]

    found = both()
    mx.eval(found)
    with composed():
        wanted = both()
        mx.eval(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        child.check(
            f"{name}: {f'gradient {i}' if i else 'output'}", float(mx.linalg.norm(a - b) / mx.linalg.norm(b)), limit
        )
    for form, way in (("kernels", contextlib.nullcontext), ("composed", composed)):
        with way():
            for what, work in (("forward", lambda: function(*given)), ("forward and backward", both)):
                with child.alone():
                    child.figure(f"{name}, {what}, {form}", milliseconds(work, 30 if child.gpu else 2), "ms")


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median time of what `work` returns, evaluated, after two runs to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        mx.eval(work())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])
