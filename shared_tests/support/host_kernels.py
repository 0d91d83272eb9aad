"""The texts of backends.mlx.kernels in plain C++, and opaque stand-ins for them: what a machine without a GPU has.

`installed(order)` makes this process look like one whose device has kernels: each text is compiled by the host's
compiler, a phase as a loop over the threads of a group, and is called where MLX would start it. A kernel can then run
wherever its inputs have values: everywhere but inside mx.compile.
`opaque()` is for counting launches in a graph that is never run: see there.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from backends.mlx import kernels
from backends.mlx.kernels import trial

PRELUDE = """
#define LANE (thread_ % 32)
#define WARP (thread_ / 32)
#define COLUMN column_
#define PLACE place_
#define ROW row_
#define SHARED
#define BEGIN EACH {
#define NEXT } EACH {
#define END }
"""
"""A barrier ends the loop over the threads of a group and begins the next one."""

ORDERS = {
    "forwards": "for (int thread_ = 0; thread_ < THREADS; ++thread_)",
    "backwards": "for (int thread_ = THREADS - 1; thread_ >= 0; --thread_)",
}
"""What a text gives in one order it must give in the other: else a thread reads what another one still writes."""

HEADER = """
#include <cstddef>
#include <cstdint>
#include <cstring>
struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float value) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        bits = uint16_t((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
    }
    explicit operator float() const {
        uint32_t word = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
};
typedef _Float16 float16_t;
"""
TYPES = {
    mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.int32: "int32_t", mx.int64: "int64_t",
}  # fmt: skip
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-Werror=return-type", "-w")
"""Rounded after every operation, as MLX's own operations are; what nobody wrote is garbage, not 0."""


def host_compiler() -> str:
    """Return the host's C++ compiler; a machine without one cannot run these tests, and must not pass them."""
    return os.environ.get("CXX", "g++")


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="skc-kernels-"))


def refused(source: str) -> str:
    """Return what the host's compiler says against a source: nothing if it is C++."""
    command = [host_compiler(), "-std=c++17", "-w", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True).stderr


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """Return the compiled C++ `source`."""
    base = _folder() / hashlib.sha256(source.encode()).hexdigest()[:16]
    base.with_suffix(".cpp").write_text(source)
    command = [host_compiler(), *FLAGS, "-shared", "-fPIC", str(base.with_suffix(".cpp")), "-o", f"{base}.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the host compiler refuses a kernel: {done.stderr[:2000]}")
    return ctypes.CDLL(f"{base}.so")


def _bytes(x: mx.array) -> np.ndarray:
    """Return an array's values as numpy has them, of bfloat16 as its bits, row after row."""
    return np.ascontiguousarray(np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x))


def maker(order: str, calls: list[str], fault: tuple[str, str] | None = None) -> Any:
    """Return what stands for mx.fast.metal_kernel; it writes the name of every kernel that is called to `calls`.

    `fault` (old, new) changes the texts that hold `old`.
    """

    def make(name: str, input_names: list[str], output_names: list[str], source: str) -> Any:
        source = source.replace(*fault) if fault else source

        def call(
            inputs: list, template: list, grid: tuple, threadgroup: tuple, output_shapes: list, output_dtypes: list
        ):
            assert all(size % part == 0 for size, part in zip(grid, threadgroup, strict=True)), (grid, threadgroup)
            threads = int(np.prod(threadgroup))
            assert threads <= 1024 and threadgroup[0] == kernels.LANES
            given = [_bytes(x) for x in inputs]
            made = [
                np.full(shape, 0xFF, "u1").repeat(dtype.size, -1)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            shapes = [np.array(x.shape, np.int32) for x in inputs]
            words = [
                f"const {TYPES[x.dtype]}* {n}, const int* {n}_shape" for n, x in zip(input_names, inputs, strict=True)
            ]
            words += [f"{TYPES[dtype]}* {n}" for n, dtype in zip(output_names, output_dtypes, strict=True)]
            constants = [
                f"constexpr int {n} = {value};" if isinstance(value, int) else f"typedef {TYPES[value]} {n};"
                for n, value in template
            ]
            body = "\n".join([
                HEADER,
                f'extern "C" void {name}(int column_, int place_, int row_, {", ".join(words)}) {{',
                f"constexpr int THREADS = {threads};\n#define EACH {ORDERS[order]}",
                *constants, source, "}",
            ])  # fmt: skip
            run = getattr(library(body), name)
            pointers = [a.ctypes.data_as(ctypes.c_void_p) for pair in zip(given, shapes, strict=True) for a in pair]
            pointers += [a.ctypes.data_as(ctypes.c_void_p) for a in made]
            columns, places, rows = (size // part for size, part in zip(grid, threadgroup, strict=True))
            for row in range(rows):
                for place in range(places):
                    for column in range(columns):
                        run(column, place, row, *pointers)
            calls.append(name)
            return [
                mx.array(a).view(dtype).reshape(shape)
                for a, dtype, shape in zip(made, output_dtypes, output_shapes, strict=True)
            ]

        return call

    return make


@contextlib.contextmanager
def device(make: Any, prelude: str = PRELUDE) -> Iterator[None]:
    """Let this process have a device whose kernels `make` makes; no op has been tried on it yet."""
    language, before = kernels.language, set(kernels.TRUSTED)
    kernels.language = lambda: (make, prelude)  # pyright: ignore[reportAttributeAccessIssue]
    kernels.TRUSTED.clear()
    trial.tried.cache_clear()
    try:
        yield
    finally:
        kernels.language = language
        kernels.TRUSTED.clear()
        kernels.TRUSTED.update(before)
        trial.tried.cache_clear()


@contextlib.contextmanager
def installed(order: str = "forwards", fault: tuple[str, str] | None = None) -> Iterator[list[str]]:
    """Give this process a device with kernels, run by the host; yield the names of those that are called.

    Engines must be built inside, with EngineOptions(compile=False); they try the kernels as on a device.
    """
    calls: list[str] = []
    with device(maker(order, calls, fault)):
        yield calls


@contextlib.contextmanager
def opaque() -> Iterator[None]:
    """Let each call of a kernel be one node named Depends in MLX's graphs, of the same inputs and output shapes.

    Its values are zeros: for graphs that are traced, compiled and counted (mx.export_to_dot), not looked at. Engines
    are to be built and traced inside; nothing else of ours makes such nodes. A node CustomTransforms, which MLX puts
    around them, launches nothing.
    """

    def make(**_: Any) -> Any:
        def call(inputs: list, output_shapes: list, output_dtypes: list, **_: Any) -> list[mx.array]:
            zeros = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            mx.eval(zeros)  # else they would be nodes, too
            return mx.depends(zeros, inputs)

        return call

    form = trial.form
    with device(make):
        trial.form = lambda op, dtype: "kernels"  # pyright: ignore[reportAttributeAccessIssue]
        kernels.TRUSTED.update((op, dtype) for op in trial.TRIALS for dtype in trial.AGREES)
        try:
            yield
        finally:
            trial.form = form
