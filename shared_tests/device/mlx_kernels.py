"""MLX's kernels at the sizes of presets: results against the composed forms, and the time of both.

Without a GPU the host's compiler runs their texts, at small sizes. MLX is imported late: gpu_check has none.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from core.check.tolerances import P1_FAST
from shared_tests.device.child import Child

SCANS = ((16, 256, 512), (4, 1024, 512), (2, 4096, 512), (16, 16, 32_768))
"""(rows, positions, channels): mixers, and the capsules of 16 blocks."""
CONVOLUTIONS = ((16, 256, 512), (4, 1024, 512))
SMALL = ((2, 40, 40),)


def run(child: Child) -> None:
    """Say which kernels are used here; check and time them."""
    import mlx.core as mx

    from backends.mlx import ops
    from backends.mlx.kernels import trial
    from shared_tests.support.host_kernels import installed

    def draw(key: int, *shape: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(key))

    names = {dtype: str(dtype).removeprefix("mlx.core.") for dtype in trial.AGREES}
    with contextlib.nullcontext() if child.gpu else installed():
        for op in trial.TRIALS:
            for dtype, name in names.items():
                words = trial.form(op, dtype)
                child.text(f"{op}, {name}", words)
                child.check(f"{op}, {name}: passed over", float(words != "kernels"), 0)
        for size in SCANS if child.gpu else SMALL:
            with child.part(f"scan {size}"):
                rows, seq, width = size
                decay = mx.sigmoid(3 + draw(1, *size)) * (draw(2, rows, seq, 1) < 2)
                given = [decay, draw(3, *size), draw(4, rows, width)]
                compare(child, f"scan {size}", lambda d, u, start: ops.scan(d, u, start, False), given, P1_FAST)
        for size in CONVOLUTIONS if child.gpu else SMALL:
            documents = mx.cumsum((draw(5, *size[:2]) > 1.5).astype(mx.int32), axis=1)
            convolve: Any = lambda x, w, documents=documents: ops.short_conv(x, w, documents)  # noqa: E731
            for dtype, name in names.items():
                with child.part(f"short_conv {size}, {name}"):
                    given = [draw(6, *size).astype(dtype), draw(7, size[2], 4)]
                    # The composed form rounds every tap and every sum of the weights' gradient.
                    limit = P1_FAST if dtype == mx.float32 else 10 * trial.AGREES[dtype]
                    compare(child, f"short_conv {size}, {name}", convolve, given, limit)


@contextlib.contextmanager
def composed() -> Iterator[None]:
    """Use no kernel inside."""
    from backends.mlx import kernels

    before = set(kernels.TRUSTED)
    kernels.TRUSTED.clear()
    try:
        yield
    finally:
        kernels.TRUSTED.update(before)


def compare(child: Child, name: str, function: Callable, given: list, limit: float) -> None:
    """Check an op's output and gradients, and time them, through the kernels and composed."""
    import mlx.core as mx

    shape = function(*given).shape
    cotangent = mx.random.normal(shape, key=mx.random.key(8)).astype(given[0].dtype)

    def both() -> list[mx.array]:
        out, grads = mx.vjp(function, given, [cotangent])
        return [*out, *grads]

    results = []
    for form, way in (("kernels", contextlib.nullcontext), ("composed", composed)):
        with way():
            results.append([x.astype(mx.float32) for x in both()])
            mx.eval(results[-1])
            for what, work in (("forward", lambda: function(*given)), ("forward and backward", both)):
                with child.alone():
                    child.figure(f"{name}, {what}, {form}", milliseconds(work, 30 if child.gpu else 2), "ms")
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        gap = float(mx.linalg.norm(a - b) / mx.linalg.norm(b))
        child.check(f"{name}: {f'gradient {i}' if i else 'output'}", gap, limit)


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median time of what `work` returns, evaluated, after two runs to warm up."""
    import mlx.core as mx

    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        mx.eval(work())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])
