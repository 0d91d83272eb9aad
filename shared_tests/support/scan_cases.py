"""Cases of Triton's scan, a float64 recurrence to hold them to, and faults that the comparison must notice.

`python -m shared_tests.support.scan_cases DEVICE FILE` runs every case on a device ("cpu": with TRITON_INTERPRET=1);
without arguments it compiles the kernels. Processes of their own, because Triton reads that variable once, when
imported.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import rng
from core.check.tolerances import P1_EXACT, P1_FAST, relative_rms
from core.engine.protocol import Arrays

LIMITS = {"float32": P1_FAST, "float64": P1_EXACT}


class Case(NamedTuple):
    """One call of scan."""

    rows: int
    seq: int
    channels: int
    dtype: str = "float32"
    rounded: bool = False
    """Inputs hold bfloat16 values."""
    strided: bool = False
    """Inputs and the gradient of the output are not contiguous."""

    def __str__(self) -> str:
        words = [word for word in ("rounded", "strided") if getattr(self, word)]
        return "-".join([f"{self.rows}x{self.seq}x{self.channels}", self.dtype, *words])


SHAPES = itertools.product((1, 3), (1, 2, 15, 16, 17, 64, 130), (1, 3, 32, 100))

# The interpreter takes 2 ms a step of 32 channels: every pair of sizes is here, but not every long triple.
CASES = [Case(*shape) for shape in SHAPES if shape[0] == 1 or shape[1] <= 17 or shape[2] == 3]

CASES += [Case(3, 64, 3, rounded=True), Case(1, 17, 100, rounded=True)]

CASES += [Case(3, 1, 3, "float64"), Case(3, 17, 33, "float64"), Case(1, 130, 1, "float64")]

CASES += [Case(3, 5, 100, strided=True), Case(0, 5, 3)]

FAULTS = {
    "delta without the next decay": ("later = tl.load(decay, live) * delta", "later = delta"),
    "d(decay) by h_t": ("h += last - C", "h += last"),
    "d(decay)_0 without start": ("delta * before", "delta"),
    "d(start) without d_0": ("tl.load(decay, live) * delta, live)", "delta, live)"),
    "no start": ("h = tl.load(start + row * C + channel, live)", "h = tl.zeros_like(tl.load(start + channel, live))"),
    "every row from the first row's start": ("h = tl.load(start + row * C", "h = tl.load(start"),
    "last position not written": ("for _ in tl.range(0, T,", "for _ in tl.range(0, T - 1,"),
    "last channel not written": ("out, h, live", "out, h, channel < C - 1"),
}
"""Changes of the kernels' source that the comparison must notice."""

FAULTY = Case(3, 17, 3)

GOOD = [((2, 5, 3), "float32"), ((2, 5, 3), "float32"), ((2, 3), "float32")]

REFUSED = {
    "decay of another length": [((2, 4, 3), "float32"), *GOOD[1:]],
    "drive of another dtype": [GOOD[0], ((2, 5, 3), "float64"), GOOD[2]],
    "start with positions": [*GOOD[:2], ((2, 5, 3), "float32")],
    "start of other channels": [*GOOD[:2], ((2, 1), "float32")],
    "bfloat16": [(shape, "bfloat16") for shape, _ in GOOD],
    "integers": [(shape, "int32") for shape, _ in GOOD],
    "no position": [((2, 0, 3), "float32")] * 2 + [GOOD[2]],
    "no channel": [((2, 5, 0), "float32")] * 2 + [((2, 0), "float32")],
    "no rows axis": [((5, 3), "float32")] * 2 + [((3,), "float32")],
}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Return finite float32 values rounded to the nearest bfloat16, ties to even, as float32."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def inputs(case: Case) -> Arrays:
    """Return decay, drive, start and the gradient of h as float64 values that the case's dtype holds."""
    rows, seq, channels = case[:3]
    name, shape = f"scan/{case}", (rows, seq, channels)
    decay = (1 + rng.uniform(0, f"{name}/decay", rows * seq * channels)) / 2
    decay[rng.integers16(0, f"{name}/near", decay.size) % 5 == 0] = 1 - 2.0**-24
    documents = rng.integers16(0, f"{name}/document", rows * seq).reshape(rows, seq, 1) % 8 == 0
    made: Arrays = {"decay": np.where(documents, 0.0, decay.reshape(shape))}
    for key, size in (("drive", shape), ("start", (rows, channels)), ("grad", shape)):
        made[key] = rng.normal(0, f"{name}/{key}", int(np.prod(size))).reshape(size)
    cast = bfloat16 if case.rounded else lambda x: x.astype(case.dtype)
    return {key: cast(value).astype(np.float64) for key, value in made.items()}


def expected(decay: np.ndarray, drive: np.ndarray, start: np.ndarray, grad: np.ndarray) -> Arrays:
    """Return h and the gradients of sum(grad * h), one position after the other."""
    seq = drive.shape[1]
    h, d_decay, d_drive = (np.empty_like(drive) for _ in range(3))
    for t in range(seq):
        h[:, t] = decay[:, t] * (h[:, t - 1] if t else start) + drive[:, t]
    for t in reversed(range(seq)):
        d_drive[:, t] = grad[:, t] + (decay[:, t + 1] * d_drive[:, t + 1] if t + 1 < seq else 0)
        d_decay[:, t] = d_drive[:, t] * (h[:, t - 1] if t else start)
    return {"h": h, "d_decay": d_decay, "d_drive": d_drive, "d_start": decay[:, 0] * d_drive[:, 0]}


def gaps(case: Case, got: Arrays) -> dict[str, float]:
    """Return the relative RMS of h and of each gradient against the oracle."""
    return {key: relative_rms(got[key], want) for key, want in expected(**inputs(case)).items()}


def outcome(scan: Any, case: Case, device: str) -> Arrays:
    """Return h and its gradients from `scan` on a device."""
    import torch

    def place(x: np.ndarray) -> torch.Tensor:
        tensor = torch.tensor(x, dtype=getattr(torch, case.dtype), device=device)
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if case.strided else tensor

    given = {key: place(x) for key, x in inputs(case).items()}
    grad = given.pop("grad")
    leaves = {key: x.requires_grad_() for key, x in given.items()}
    h = scan(**leaves)
    grads = torch.autograd.grad(h, list(leaves.values()), grad)
    made = {"h": h.detach()} | {f"d_{key}": x for key, x in zip(leaves, grads, strict=True)}
    return {key: x.cpu().numpy() for key, x in made.items()}


def load(source: str, folder: str, name: str) -> Any:
    """Return the module of a changed source: Triton reads a kernel's lines from its file."""
    path = Path(folder) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(device: str, file: str) -> None:
    """Run every case, fault and refusal on a device; write the arrays to `file` and print the messages as JSON."""
    import torch

    from backends.cuda.kernels import scan as kernels

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN: what a kernel leaves out is seen
    found = {f"{case}/{key}": x for case in CASES for key, x in outcome(kernels.scan, case, device).items()}
    source = Path(kernels.__file__).read_text()
    with tempfile.TemporaryDirectory() as folder:
        for i, (fault, (old, new)) in enumerate(FAULTS.items()):
            assert source.count(old) == 1, f"{fault}: the kernels no longer hold {old!r}"
            faulty = load(source.replace(old, new), folder, f"fault{i}").scan
            found |= {f"{fault}/{key}": x for key, x in outcome(faulty, FAULTY, device).items()}
    np.savez(file, **found)  # pyright: ignore[reportArgumentType]
    messages = {}
    for name, given in REFUSED.items():
        try:
            kernels.scan(*(torch.ones(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in given))
            messages[name] = "accepted"
        except ValueError as error:
            messages[name] = str(error)
    print(json.dumps(messages))


def compile_for_h100() -> None:
    """Print each kernel with its number of asynchronous loads and the shared memory that a program takes."""
    import triton  # pyright: ignore[reportMissingImports]: no wheel for macOS
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    from backends.cuda.kernels import scan as kernels

    fixed = {"BLOCK": kernels.BLOCK, "STAGES": kernels.STAGES}
    for dtype, numbers in (("*fp32", fixed), ("*fp64", fixed | {"C": 1})):  # Triton makes a channel count of 1 constant
        for kernel in (kernels.forward_kernel, kernels.backward_kernel):
            names = kernel.arg_names
            types = {"T": "i32", "C": "i32"} | dict.fromkeys(numbers, "constexpr")
            source = triton.compiler.ASTSource(
                kernel,
                {name: types.get(name, dtype) for name in names},
                {(names.index(name),): number for name, number in numbers.items()},
                {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in types},
            )
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
            print(kernel.fn.__name__, made.asm["ptx"].count("cp.async.ca"), made.metadata.shared)


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment, without a choice of the interpreter that it may hold."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | extra


class Run(NamedTuple):
    """What a process of `main` found."""

    arrays: Arrays
    messages: dict[str, str]

    def of(self, name: object) -> Arrays:
        """Return h and the gradients of a case or fault."""
        return {key: self.arrays[f"{name}/{key}"] for key in ("h", "d_decay", "d_drive", "d_start")}


def found_by(module: str, device: str, folder: Path) -> tuple[Arrays, dict[str, str]]:
    """Run a module's `main` in its own process (cpu: in Triton's interpreter) and return what it found and said."""
    variables = environment(TRITON_INTERPRET="1") if device == "cpu" else environment()
    command = [sys.executable, "-m", module, device, str(folder / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "found.npz") as found:
        return dict(found), json.loads(done.stdout)


def run(device: str, folder: Path) -> Run:
    """Run `main` on a device."""
    return Run(*found_by("shared_tests.support.scan_cases", device, folder))


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else compile_for_h100()
