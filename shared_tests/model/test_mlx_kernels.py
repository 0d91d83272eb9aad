"""MLX's kernels, whose shipped texts the host's compiler runs as plain C++: the composed forms' results, every size.

What is not run here: Metal's and CUDA's own compilers, and a GPU. There each kernel is tried before it is used
(backends/mlx/kernels/trial.py), which is shown here with faults in the texts. Without a C++ compiler these tests fail.
Budget: 60 s.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from backends.mlx import kernels, ops
from backends.mlx.kernels import scan, short_conv, trial
from core.check.tolerances import P2_BFLOAT16, P2_FLOAT32, P4_FLOAT32, relative_rms
from core.engine.protocol import Arrays
from core.training import schedule
from shared_tests.support import host_kernels
from shared_tests.support.harness import batches, draw, engine, mini, to_device, to_numpy, working_weights
from shared_tests.support.host_kernels import ORDERS, installed, opaque

KERNELS = {
    op: (module.forward_kernel, module.backward_kernel) for op, module in (("scan", scan), ("short_conv", short_conv))
}
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2048, 2085)
BUFFERS = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
FOUR = {"skc_scan", "skc_scan_back", "skc_conv", "skc_conv_back"}


def results(function: Callable, given: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    """Return an op's output and the gradients of all that is given, for random gradients of the output."""
    arrays = [to_device("mlx", x, dtype) for x in given]
    out = function(*arrays)
    cotangent = to_device("mlx", draw("kernels/cotangent", *out.shape), dtype)
    _, grads = mx.vjp(function, arrays, [cotangent])
    return [to_numpy(x) for x in (out, *grads)]


def scanned(rows: int, seq: int, width: int) -> list[np.ndarray]:
    """Return results of the fast scan: some decays are exactly 0, some next to 1."""
    decay = 1 / (1 + np.exp(3 * draw("kernels/decay", rows, seq, width)))
    decay[0, 1::7], decay[-1, ::3] = 0.0, 1 - 2.0**-24
    given = [decay, draw("kernels/drive", rows, seq, width), draw("kernels/start", rows, width)]
    return results(lambda d, u, start: ops.scan(d, u, start, False), given, "float32")


def convolved(rows: int, seq: int, width: int, taps: int, dtype: str, kind: str = "") -> list[np.ndarray]:
    """Return results of the convolution of documents of about five tokens, computed in `kind` of values of `dtype`."""
    x, weight = draw("kernels/x", rows, taps - 1 + seq, width), draw("kernels/weight", width, taps)
    documents = np.cumsum(draw("kernels/documents", rows, taps - 1 + seq) > 0.8, axis=1).astype(np.int32)
    given = [to_numpy(to_device("mlx", v, dtype).astype(mx.float32)) for v in (x, weight)]
    return results(lambda x, w: ops.short_conv(x, w, to_device("mlx", documents, "")), given, kind or dtype)


def test_the_machine_is_tested_as_a_cpu() -> None:
    assert kernels.language() is None and not kernels.trusted("scan", mx.zeros((1,)))


@pytest.mark.parametrize(
    "order, seq", [("forwards", seq) for seq in LENGTHS] + [("backwards", 33), ("backwards", 1061)]
)
def test_the_scans_texts_give_the_bits_of_the_composed_form(order: str, seq: int) -> None:
    for rows, width in ((1, 1), (3, 33)) if seq > 256 else ((1, 1), (2, 32), (3, 100)):
        wanted = scanned(rows, seq, width)
        with installed(order) as calls:
            kernels.TRUSTED.add(("scan", mx.float32))
            got = scanned(rows, seq, width)
        assert calls == ["skc_scan", "skc_scan", "skc_scan_back"]  # the second forward pass is the gradients'
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)), (rows, width)


@pytest.mark.parametrize("order, dtype", [*itertools.product(ORDERS, ("float32", "float16", "bfloat16"))])
def test_the_convolutions_texts_give_the_composed_form_rounded_once(order: str, dtype: str) -> None:
    limit = trial.AGREES[getattr(mx, dtype)]
    for rows, seq, width, taps in ((1, 1, 1, 4), (3, 2, 33, 4), (2, 65, 32, 4), (2, 31, 100, 1), (1, 257, 3, 2)):
        wanted = convolved(rows, seq, width, taps, dtype, "float32")
        with installed(order) as calls:
            kernels.TRUSTED.add(("short_conv", getattr(mx, dtype)))
            got = convolved(rows, seq, width, taps, dtype)
        assert calls == ["skc_conv", "skc_conv", "skc_conv_back"]
        assert np.array_equal(got[0], to_numpy(to_device("mlx", wanted[0], "float32").astype(getattr(mx, dtype))))
        assert max(map(relative_rms, got, wanted)) <= limit


FAULTS: dict[str, list[tuple[str, str]]] = {
    "scan": [
        ("ENTERING start[row * width + c]", "ENTERING start[c]"),
        ("h = DRIVE + DECAY * h;\n                product", "h = DRIVE + DECAY;\n                product"),
        ("product = product * DECAY;", ""),
        ("states[at] = h;", "states[at] = drive[at];"),
        ("turn < chunks", "turn < 32"),
        (
            "            ends[k][LANE] = h;\n            h = next;",
            "            h = next;\n            ends[k][LANE] = h;",
        ),
        ("        carry[LANE] = h;\n", ""),
        ("whole[k][LANE] * h", "whole[0][LANE] * h"),
        ("? decay[at + width]", "? decay[at]"),
        ("? states[at - width]", "? states[at]"),
        (": start[row * width + c])", ": 0.0f)"),
        ("if (POSITION == 0)", "if (POSITION == 32)"),
        ("= decay[at] * h;", "= h;"),
        ("d_drive[at] = h;", ""),
        ("(chunks - turn - WARP)", "(chunks - turn)"),
        ("whole[WARP][LANE] = product;\nNEXT", "whole[WARP][LANE] = product;\n"),
        ("    }\nNEXT\n", "    }\n}{\n"),
        ("(seq + 31) / 32", "seq / 32"),
        ("const size_t row = ROW", "const size_t row = 0"),
        ("h = next;", "h = nothing;"),
    ],
    "short_conv": [
        ("if (documents[now - i] == documents[now])", ""),
        ("x[(now - i) * width + c]", "x[now * width + c]"),
        ("weight[c * TAPS + i])) * float(x", "weight[c * TAPS])) * float(x"),
        ("t = PLACE * WARPS + WARP", "t = WARP"),
        ("p - (TAPS - 1) + i", "p - i"),
        ("&& documents[here + i] == documents[here]", ""),
        ("p += WARPS) {", "p += 2 * WARPS) {"),
        ("sum = sum + sums[k][i][LANE]", "sum = sums[k][i][LANE]"),
        ("d_weight[(size_t(ROW) * width + c) * TAPS + i]", "d_weight[c * TAPS + i]"),
        ("LANE] = partial[i];\nNEXT", "LANE] = partial[i];\n}{"),
        ("t < seq)", "t < seq - 1)"),
        ("* g;", "* h;"),
    ],
}
"""Wrong indices, forgotten neighbours, missing barriers, and what does not compile."""


@pytest.mark.parametrize("op, fault", [(op, fault) for op, faults in FAULTS.items() for fault in faults])
def test_a_fault_in_a_text_is_seen_when_it_is_tried(op: str, fault: tuple[str, str]) -> None:
    assert any(fault[0] in kernel.text for kernel in KERNELS[op]), "no text holds this any more"
    for order in ORDERS:  # a missing barrier shows in one of them
        with installed(order, fault):
            said = trial.form(op, mx.float32)
            assert len(kernels.TRUSTED) == (said == "kernels")
        if said != "kernels":
            break
    assert "(kernels passed over: " in said and "\n" not in said


@pytest.mark.parametrize("op, dtype", [*itertools.product(trial.TRIALS, trial.AGREES)])
def test_the_texts_as_they_are_are_used(op: str, dtype: mx.Dtype) -> None:
    with installed():
        assert trial.form(op, dtype) == "kernels"
        assert list(kernels.TRUSTED) == [(op, mx.float32 if op == "scan" else dtype)]
        assert not kernels.trusted(op, mx.zeros((1,)).astype(mx.float64))
    assert not kernels.TRUSTED and trial.form(op, dtype) == trial.TRIALS[op][1]


def test_a_second_trial_leaves_the_first_ones_result() -> None:
    with installed():
        for dtype in trial.AGREES:
            assert trial.form("short_conv", dtype) == "kernels"
        assert len(kernels.TRUSTED) == 3


# Engines.


def trained(dtype: str) -> tuple[tuple[str, ...], list[float], Arrays]:
    """Return the notes of an engine, its losses over three steps, and the weights after them, with the logits of a
    token that is decoded alone after 36 others.
    """
    config = mini("skc_ablate")
    made = engine("mlx", config, working_weights(config.model, 1.0), dtype=dtype, compile=False)
    losses = [
        made.train_step(batch, schedule.plan(step, 0.5, config.train)).result().loss
        for step, batch in enumerate(batches(config, 3))
    ]
    text = batches(config, 1)[0].tokens[:2]
    state = made.commit(made.chunk(made.start(2), text[:, :36]), 36)
    return made.notes, losses, made.params() | {"logits": made.chunk(state, text[:, 36:]).logits()}


@pytest.fixture(scope="module")
def composed() -> Iterator[Any]:
    yield {dtype: trained(dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_trains_through_the_kernels(composed: Any, dtype: str) -> None:
    with installed() as calls:
        notes, losses, params = trained(dtype)
    assert set(calls) == FOUR
    assert "scan: kernels" in notes and "short convolution: kernels" in notes
    wanted = composed[dtype]
    assert "scan: in chunks" in wanted[0] and not [note for note in wanted[0] if "kernel" in note]
    gap = max(relative_rms(params[name], wanted[2][name]) for name in params)
    apart = max(abs(a - b) for a, b in zip(losses, wanted[1], strict=True))
    if dtype == "float32":
        assert apart <= P4_FLOAT32 / 10 and gap <= P2_FLOAT32
    else:  # one rounding instead of several: 4e-4 apart
        assert apart <= P2_BFLOAT16 / 10


def test_an_engine_falls_back_and_says_so(composed: Any) -> None:
    with installed("forwards", ("states[at] = h;", "states[at] = h + drive[at];")):
        notes, losses, params = trained("float32")
    (said,) = [note for note in notes if note.startswith("scan: in chunks (kernels passed over: wrong here, by ")]
    assert "short convolution: kernels" in notes
    assert max(abs(a - b) for a, b in zip(losses, composed["float32"][1], strict=True)) <= P4_FLOAT32


def test_float64_and_exact_engines_never_see_a_kernel() -> None:
    with installed() as calls:
        notes, _, _ = trained("float64")
        assert not calls and "scan: exact, step by step" in notes and "short convolution: composed" in notes


def test_stand_ins_count_one_launch_a_call(tmp_path: Path) -> None:
    config = mini("skc_ablate")
    with opaque():
        made: Any = engine("mlx", config, working_weights(config.model, 1.0))
        rows = mx.zeros((2, 64), mx.int32)
        traced = mx.compile(made._gradient)(made._params, rows, rows, made._constants(64), True)
        mx.export_to_dot(str(tmp_path / "step.dot"), traced[0], *traced[2].values())
    kinds = [config.model.kind(config.model.block_of(layer)) for layer in range(config.model.layers)]
    labels = re.findall(r'label ="(\w+)"', (tmp_path / "step.dot").read_text())
    wanted = sum(4 + 2 * (kind != "koopman") for kind in kinds)  # convolution and scan; capsules scan once more
    assert sorted(set(kinds)) == ["koopman", "skc"] and labels.count("Depends") == wanted


# What a device and its compiler are given.


@pytest.mark.parametrize("system, given, wanted", [
    ("darwin", {}, "200 400"), ("darwin", {"MLX_MAX_OPS_PER_BUFFER": "7"}, "7 400"), ("linux", {}, "None None"),
])  # fmt: skip
def test_command_buffers_are_wide_on_a_mac_unless_the_user_says_otherwise(
    system: str, given: dict, wanted: str
) -> None:
    read = " ".join(f"{{os.environ.get('{name}')}}" for name in BUFFERS)
    program = f'import os, sys; sys.platform = {system!r}; import backends.mlx; print(f"{read}")'
    clean = {name: value for name, value in os.environ.items() if name not in BUFFERS} | given
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.strip() == wanted
    header = Path(str(mx.__file__)).parent / "include" / "mlx" / "utils.h"
    assert all(f'"{name}"' in header.read_text() for name in BUFFERS), "MLX reads other names"


def test_notes_say_what_the_command_buffers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUFFERS:
        monkeypatch.delenv(name, raising=False)
    model = mini("skc_ablate").model
    assert trial.notes(model, mx.float32, False) == ["scan: in chunks"]
    monkeypatch.setenv(BUFFERS[0], "200")
    assert trial.notes(model, mx.float32, False)[1:] == ["command buffers: 200 operations, MLX's MB"]


SHIM = """
#include <cstddef>
#include <cstdint>
#define device
#define constant
#define threadgroup
struct uint3 { unsigned x, y, z; };
namespace metal {
enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags);
}
#define __shared__
extern const uint3 threadIdx, blockIdx;
void __syncthreads();
"""
"""As much of Metal and of CUDA as the texts use, in C++, to be parsed."""


def called(make: Callable) -> None:
    """Call all four kernels as the engine does, on a device whose kernels `make` makes."""
    x = mx.ones((2, 70, 33))

    def everything(x: mx.array, start: mx.array, weight: mx.array, documents: mx.array) -> tuple[mx.array, ...]:
        narrow, grad = x.astype(mx.bfloat16), x[:, 3:].astype(mx.bfloat16)
        out = [scan.forward(x, x, start), *scan.backward(x, x, start, x)]
        out += [short_conv.forward(narrow, weight, documents), *short_conv.backward(narrow, weight, documents, grad)]
        return tuple(out)

    given = x, mx.ones((2, 33)), mx.ones((33, 4)), mx.ones((2, 70), mx.int32)
    with host_kernels.device(make, kernels.METAL), tempfile.TemporaryDirectory() as folder:
        mx.export_function(f"{folder}/kernels.mlxfn", everything, *given)  # MLX makes kernels without a device for this


def test_what_mlx_writes_parses(capfd: pytest.CaptureFixture[str]) -> None:
    """MLX takes our calls, sees the attributes that the texts use, and writes functions without errors in them."""

    def make(**names: Any) -> Callable:
        made: Any = mx.fast.metal_kernel(**names)
        return lambda **call: made(verbose=True, **call)

    called(make)
    sources = re.findall(r"```\n(.*?)```", capfd.readouterr().out, re.DOTALL)
    assert len(sources) == 4
    for source in sources:
        assert source.count("uint3 thread_position_in_threadgroup [[") == 1
        assert source.count("uint3 threadgroup_position_in_grid [[") == 1
        function, instance = re.fullmatch(r"(.*\}\n).*decltype\((.*?)\) .*", source, re.DOTALL).groups()  # type: ignore[union-attr]
        for language in (kernels.METAL, kernels.CUDA):
            text = f"{host_kernels.HEADER}{SHIM}{function.replace(kernels.METAL, language)}\nauto used = &{instance};\n"
            assert not host_kernels.refused(text), text
            assert "LANE" in host_kernels.refused(text.replace("#define LANE", "#define LINE"))
