"""Kernels for a GPU: one text an op, compiled as Metal or as CUDA by what stands in front of it.

A text is phases: BEGIN ... NEXT ... END. NEXT and END are barriers, and no variable of a thread outlives its phase: so
in plain C++ each phase may be a loop over the threads of a group, and the tests run the shipped texts that way.
A group is 32 lanes (LANE) times some warps (WARP); COLUMN, PLACE and ROW are the group's own place. SHARED is memory
of the group. An input's shape is NAME_shape; MLX finds names of Metal's attributes in the text, so they lie before it.
"""

import functools
from typing import Any

import mlx.core as mx

LANES = 32
METAL = """
#define LANE int(thread_position_in_threadgroup.x)
#define WARP int(thread_position_in_threadgroup.y)
#define COLUMN int(threadgroup_position_in_grid.x)
#define PLACE int(threadgroup_position_in_grid.y)
#define ROW int(threadgroup_position_in_grid.z)
#define SHARED threadgroup
#define BEGIN {
#define NEXT } metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup); {
#define END } metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
"""
CUDA = """
#define LANE int(threadIdx.x)
#define WARP int(threadIdx.y)
#define COLUMN int(blockIdx.x)
#define PLACE int(blockIdx.y)
#define ROW int(blockIdx.z)
#define SHARED __shared__
#define BEGIN {
#define NEXT } __syncthreads(); {
#define END } __syncthreads();
"""
TRUSTED: set[tuple[str, mx.Dtype]] = set()
"""Ops and types whose kernels have given here what the composed forms give: kernels/trial.py adds them."""


def language() -> Any:
    """Return what makes kernels on the device in use, and the words before a text; None: a CPU, which has none."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    return (mx.fast.metal_kernel, METAL) if mx.metal.is_available() else (mx.fast.cuda_kernel, CUDA)


def trusted(op, x):
    """Return whether `op` goes through its kernels for an x of this type, on the device in use."""
    return (op, x.dtype) in TRUSTED and language() is not None


@functools.cache
def _made(make, name, inputs, outputs, source):
    return make(name=name, input_names=list(inputs), output_names=list(outputs), source=source)


class Kernel:
    """A text with the names of its inputs and outputs: one launch a call."""

    def __init__(self, name, inputs, outputs, text):
        self.name, self.inputs, self.outputs, self.text = name, tuple(inputs.split()), tuple(outputs.split()), text

    def __call__(self, inputs, constants, groups, warps, shapes, dtypes):
        """Return the outputs: constants (name, int or type) of the text, groups (columns, places, rows) to start."""
        make, prelude = language()
        columns, places, rows = groups
        return _made(make, self.name, self.inputs, self.outputs, prelude + self.text)(
            inputs=list(inputs),
            template=constants,
            grid=(columns * LANES, places * warps, rows),
            threadgroup=(LANES, warps, 1),
            output_shapes=shapes,
            output_dtypes=dtypes,
        )
