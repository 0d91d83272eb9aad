"""Counts the launches of one training step of the MLX engine, from its compiled graph: no Mac is needed.

A launch is what Metal starts a kernel for: every operation of the graph but views; a Concatenate copies each input with
a kernel of its own. MLX composes on a CPU what Metal has primitives for, so opaque stand-ins of the same shapes are put
in their place while the graph is built; nothing is computed. Counts are lower bounds: a copy that a primitive makes of
an input in other strides is in no graph.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from backends.mlx import attention
from core.config import RunConfig
from core.engine.plan import NUMBERS
from core.model.params import param_table
from shared_tests.support import host_kernels
from shared_tests.support.harness import engine

VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "CustomTransforms", "ExpandDims", "Flatten"),
    *("NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
"""Primitives that start no kernel; what is made contiguous is so already."""
PER_INPUT = ("Concatenate", "Stack")
TWICE = ("SliceUpdate",)
"""Copies what it changes, then writes."""
NODE = re.compile(r'(\d+) \[label ="(\w+)", shape=rectangle\]')
EDGE = re.compile(r'"\w+" -> (\d+)\n')


def opaque(inputs: list[mx.array], shapes: list[tuple[tuple[int, ...], mx.Dtype]]) -> list[mx.array]:
    """Return arrays of (shape, type) that one launch makes of `inputs`: one node, which fuses with nothing."""
    return mx.depends([mx.broadcast_to(mx.array(0, kind), shape) for shape, kind in shapes], inputs)


def primitive(function: Callable, forward: int = 1, backward: int = 1) -> Callable:
    """Return a stand-in for a function of arrays that is so many launches forward and backward."""

    @mx.custom_function
    def stand_in(*arrays: Any) -> Any:
        out = function(*arrays)
        return _repeated([*arrays], [(out.shape, out.dtype)], forward)[0]

    @stand_in.vjp
    def backwards(primals: Any, cotangent: Any, output: Any) -> Any:
        primals = [primals] if isinstance(primals, mx.array) else list(primals)
        grads = _repeated([*primals, cotangent], [(x.shape, x.dtype) for x in primals], backward)
        return grads[0] if len(grads) == 1 else tuple(grads)

    return stand_in


def _repeated(inputs: list[mx.array], shapes: list, times: int) -> list[mx.array]:
    for _ in range(times):
        inputs = opaque(inputs, shapes)
    return inputs


@contextmanager
def on_metal() -> Iterator[None]:
    """Let MLX's fused functions be what they are on Metal: RMSNorm 1 launch and 2 backward, RoPE 1 each.

    Attention has the form that it takes on a GPU: MLX's own is fused there only when it scores.
    """
    rms_norm, rope, choose = mx.fast.rms_norm, mx.fast.rope, attention.choose

    def norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        arrays = [x] if weight is None else [x, weight]
        return primitive(lambda x, weight=None: rms_norm(x, weight, eps), backward=2)(*arrays)

    def turned(x: mx.array, dims: int, **settings: Any) -> mx.array:
        return primitive(lambda x: rope(x, dims, **settings))(x)

    with (
        mock.patch.object(mx.fast, "rms_norm", norm),
        mock.patch.object(mx.fast, "rope", turned),
        mock.patch.object(attention, "choose", lambda exact, gpu: choose(exact, True)),
    ):
        yield


def count(outputs: Any, inputs: Any = ()) -> Counter[str]:
    """Return the launches by primitive between two trees of arrays; what is fused is one 'Compiled'. Nothing runs."""
    text = io.StringIO()
    mx.export_to_dot(text, *(value for _, value in tree_flatten(outputs) if value is not None))
    copied, launches = Counter(EDGE.findall(text.getvalue())), Counter()
    for node, label in NODE.findall(text.getvalue()):
        name = "Compiled" if label.startswith("Compiled") else label
        if name not in VIEWS:
            launches[name] += copied[node] if name in PER_INPUT else 1 + (name in TWICE)
    return launches - count(inputs) if inputs else launches


def step(config: RunConfig) -> dict[str, Counter[str]]:
    """Return the launches of a compiled training step of one micro-batch in bfloat16, and of its quantisers alone."""
    weights = {name: np.zeros(row.shape, np.float32) for name, row in param_table(config.model).items()}
    train = config.train
    with on_metal(), host_kernels.opaque():
        engine_: Any = engine("mlx", config, weights, dtype="bfloat16", compile=True)
        rows = mx.zeros((min(train.rows, 8192 // train.seq), train.seq), mx.int32)
        hyper = mx.ones((len(NUMBERS),))
        tables, switches = engine_._constants(train.seq), (True, True, engine_._given(7, 0, hyper))
        given = engine_._state, rows, rows, tables, hyper, *switches
        trained = engine_._trained(engine_._params, train.quantise == "always")
        out = engine_._whole(engine_._params, trained, *given)
        inputs = [engine_._params, given[0], rows, *given[3][:2], given[4]]
        return {"quantisers": count(trained, inputs), "step": count(out, inputs)}
