"""Cases of Triton's softcapped cross-entropy, the ops they are held to, and faults that the comparison must notice.

`python -m shared_tests.support.cross_entropy_cases DEVICE FILE` runs every case on a device ("cpu": with
TRITON_INTERPRET=1); without arguments it compiles the kernels, and traces a training step that uses them. Processes
of their own, because Triton reads that variable once, when imported.
"""

import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import rng
from core.check.tolerances import P1_EXACT, P1_FAST, P2_BFLOAT16, relative_rms
from core.config import changed
from core.engine.protocol import Arrays
from shared_tests.support.scan_cases import found_by, load


class Case(NamedTuple):
    """One call of cross_entropy on logits (rows, vocab)."""

    rows: int
    vocab: int
    cap: float | None = 30.0
    dtype: str = "float32"
    z: bool = True
    """The logsumexp has a cotangent too, as the z-loss gives it."""
    strided: bool = False
    """Logits, cotangents and bias are not contiguous."""
    biased: bool = False

    def __str__(self) -> str:
        words = [word for word in ("z", "strided", "biased") if getattr(self, word)]
        return "-".join([f"{self.rows}x{self.vocab}", f"cap{self.cap}", self.dtype, *words])

    def limit(self, output: str) -> float:
        """Return the largest relative RMS: gradients of bfloat16 logits are bfloat16."""
        if self.dtype == "bfloat16" and output == "gradient":
            return P2_BFLOAT16
        return P1_EXACT if self.dtype == "float64" else P1_FAST


SIZES = itertools.product((1, 3), (1, 2, 7, 1000, 1024, 1025))

CASES = [Case(rows, vocab, cap) for rows, vocab in SIZES for cap in (None, 30.0)]

CASES += [Case(2, 8192, cap, dtype) for cap in (None, 15.0) for dtype in ("float32", "bfloat16", "float64")]

CASES += [Case(3, 2500, 2.5, z=False), Case(3, 1025, dtype="bfloat16"), Case(4, 37, strided=True), Case(0, 5)]

# The bias's gradient is summed by programs of 32 rows.
BIASED = [(1, 1, 30.0), (3, 1025, None), (4, 37, 30.0), (32, 7, 30.0), (33, 7, 30.0), (66, 7, 15.0), (0, 5, 30.0)]

CASES += [Case(n, v, cap, dtype, biased=True) for n, v, cap in BIASED for dtype in ("float32", "bfloat16")]

CASES += [Case(3, 1030, 2.5, "float64", biased=True), Case(5, 37, strided=True, biased=True)]

CASES += [Case(34, 9, z=False, biased=True)]

FAULTY = Case(5, 1500, 2.5, biased=True)
"""With programs of 2 rows: interpreted rows take time."""

FAULTS = {
    "no slope of the cap": ("dx = slope * y[1]", "dx = slope"),
    "the target's logit is not capped": ("hit, _ = capped(hit, CAP)", "hit += 0"),
    "the target's logit without its bias": ("hit += tl.load(bias + target, inside, 0.0)", "hit += 0"),
    "no bias": ("x += tl.load(bias + place, place < V, 0.0)", "x += 0"),
    "a gradient without the bias": ("shift = tl.load(", "shift = 0 * tl.load("),
    "the bias's gradient of a program's last row": ("column += dx", "column = dx"),
    "the bias's gradient of one program": ("d_bias += tl.program_id(0)", "d_bias += 0 * tl.program_id(0)"),
    "the bias's gradient of the logits' targets alone": ("column += dx", "column += tl.where(slope < 0, dx, 0.0)"),
    "no cotangent of the logsumexp": ("both = ours + tl.load(grad_total + row)", "both = ours"),
    "no one-hot": ("tl.where(place == tl.load(targets + row), ours, 0.0)", "0.0"),
    "the sum keeps an old maximum": ("mass * tl.exp(top - new)", "mass"),
    "what lies past the vocabulary counts": ('x = tl.where(place < V, x, float("-inf"))', "x = x + 0"),
    "the gradient's first block only": ("tl.store(out + row * V + place, ", "tl.store(out + row * V + place % BLOCK, "),
    "every row is the first": ("row = tl.program_id(0).to(tl.int64)  #", "row = tl.program_id(0).to(tl.int64) * 0  #"),
}  # fmt: skip
"""Changes of the kernels' source that the comparison must notice."""

GOOD = [((2, 3, 5), "float32"), ((2, 3), "int32")]

REFUSED = {
    "float16": [((2, 3, 5), "float16"), GOOD[1]],
    "targets of another shape": [GOOD[0], ((3, 2), "int32")],
    "targets that are not whole": [GOOD[0], ((2, 3), "float32")],
    "no vocabulary": [((2, 3, 0), "float32"), GOOD[1]],
    "no axis": [((), "float32"), ((), "int32")],
    "a bias of another size": [*GOOD, ((4,), "float32")],
    "a bias for each row": [*GOOD, ((2, 5), "float32")],
    "a narrow bias": [((2, 3, 5), "bfloat16"), GOOD[1], ((5,), "bfloat16")],
    "a bias narrower than the logits": [((2, 3, 5), "float64"), GOOD[1], ((5,), "float32")],
}


def inputs(case: Case) -> Arrays:
    """Return logits as the case's dtype holds them, targets at both ends and between, and two cotangents."""
    import torch

    name, shape = f"cross_entropy/{case}", (case.rows, case.vocab)
    # Half of the logits are beyond the cap's linear part; without a cap they are as hot as one of 30 would let them be.
    logits = rng.normal(0, name, case.rows * case.vocab).reshape(shape) * (case.cap or 10.0)
    held = torch.tensor(logits, dtype=getattr(torch, case.dtype)).double().numpy()
    targets = np.resize([0, case.vocab - 1, case.vocab // 2, 1 % case.vocab], case.rows).astype(np.int32)
    grads = [rng.normal(0, f"{name}/{i}", case.rows).astype(np.float32).astype(np.float64) for i in "nz"]
    made = {"logits": held, "targets": targets, "grad_nll": grads[0], "grad_total": grads[1] * case.z}
    if case.biased:
        bias = rng.normal(0, f"{name}/bias", case.vocab) * (case.cap or 10.0) / 2
        made["bias"] = bias.astype(np.float32).astype(np.float64)
    return made


def expected(case: Case) -> Arrays:
    """Return what the two ops give in float64."""
    import torch

    from backends.cuda import ops

    given = {key: torch.tensor(x) for key, x in inputs(case).items()}
    leaves = [given[key].requires_grad_() for key in ("logits", "bias") if key in given]
    logits = leaves[0] + leaves[1] if case.biased else leaves[0]
    capped = logits if case.cap is None else ops.softcap(logits, case.cap, True)
    nll, total = ops.cross_entropy(capped, given["targets"], True)
    grads = torch.autograd.grad((nll, total), leaves, (given["grad_nll"], given["grad_total"]))
    return named([nll, total, *grads])


def named(outputs: list) -> Arrays:
    """Return -log p, logsumexp, the logits' gradient and, if there is one, the bias's, by name."""
    names = ("nll", "total", "gradient", "gradient of the bias")
    return {name: x.detach().double().cpu().numpy() for name, x in zip(names, outputs, strict=False)}


def outcome(module: Any, case: Case, device: str) -> Arrays:
    """Return nll, logsumexp and the gradients from the kernels on a device."""
    import torch

    given = {key: torch.tensor(x, device=device) for key, x in inputs(case).items()}
    logits, wide = given["logits"].to(getattr(torch, case.dtype)), torch.promote_types(
        getattr(torch, case.dtype), torch.float32
    )  # fmt: skip
    grads = [given[key].to(wide) for key in ("grad_nll", "grad_total")]
    leaves = [logits, given["bias"].to(wide)] if case.biased else [logits]
    if case.strided:
        logits = leaves[0] = logits.T.contiguous().T
        grads, leaves[1:] = ([torch.stack([x, x], dim=1)[:, 0] for x in side] for side in (grads, leaves[1:]))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found = module.cross_entropy(leaves[0], given["targets"], case.cap, *leaves[1:])
    made = torch.autograd.grad(found, leaves, grads)
    assert made[0].dtype == logits.dtype and {x.dtype for x in (*found, *made[1:])} == {wide}
    return named([*found, *made])


def main(device: str, file: str) -> None:
    """Run every case, fault and refusal on a device; write the arrays to `file` and print the messages as JSON."""
    import torch

    from backends.cuda.kernels import cross_entropy as kernels

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN: what a kernel leaves out is seen
    np.seterr(all="ignore")  # the interpreter computes what lies past the vocabulary, too
    found = {f"{case}/{key}": x for case in CASES for key, x in outcome(kernels, case, device).items()}
    source = Path(kernels.__file__).read_text().replace("BIASED_ROWS = 32", "BIASED_ROWS = 2")
    with tempfile.TemporaryDirectory() as folder:
        for i, (fault, (old, new)) in enumerate(FAULTS.items()):
            assert source.count(old) == 1, f"{fault}: the kernels no longer hold {old!r}"
            faulty = load(source.replace(old, new), folder, f"fault{i}")
            found |= {f"{fault}/{key}": x for key, x in outcome(faulty, FAULTY, device).items()}
    outside = torch.zeros(1, 3, device=device), torch.tensor([3], dtype=torch.int32, device=device)
    found["outside"] = kernels.cross_entropy(*outside, 30.0)[0].cpu().numpy()
    np.savez(file, **found)  # pyright: ignore[reportArgumentType]
    messages = {}
    for name, given in REFUSED.items():
        try:
            x, t, *bias = (torch.ones(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in given)
            kernels.cross_entropy(x, t, 30.0, *bias)
            messages[name] = "accepted"
        except ValueError as error:
            messages[name] = str(error)
    print(json.dumps(messages))


def compile_and_trace() -> None:
    """Print each kernel as compiled for an H100, then what torch.compile makes of a step that uses the kernels."""
    import triton  # pyright: ignore[reportMissingImports]: no wheel for macOS
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    from backends.cuda.kernels import cross_entropy as kernels

    for dtype, cap, biased in (("*bf16", 30.0, True), ("*fp32", None, False), ("*fp64", 30.0, True)):
        for kernel in (kernels.forward_kernel, kernels.backward_kernel):
            fixed = {"CAP": cap, "BIASED": biased, "ROWS": kernels.BIASED_ROWS if biased else 1, "BLOCK": kernels.BLOCK}
            names, types = kernel.arg_names, {"N": "i32", "V": "i32", "targets": "*i32", "logits": dtype, "out": dtype}
            fixed = {name: value for name, value in fixed.items() if name in names}
            types |= dict.fromkeys(fixed, "constexpr")
            wide = "*fp64" if dtype == "*fp64" else "*fp32"
            source = triton.compiler.ASTSource(
                kernel,
                {name: types.get(name, wide) for name in names},
                {(names.index(name),): value for name, value in fixed.items()},
            )
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
            print(kernel.fn.__name__, dtype, cap, len(made.asm["cubin"]), made.metadata.shared)
    print(trace())


def trace() -> str:
    """Return how many graphs a whole step is, and the kernels and attentions in them.

    Nothing of it runs: the compiler is given what it would get on a GPU.
    """
    import torch
    import torch._dynamo.variables.builder as builder

    from backends.cuda import attention, ops
    from backends.cuda.kernels.cross_entropy import cross_entropy
    from backends.cuda.kernels.scan import scan
    from shared_tests.support.harness import batches, engine, mini

    class Traced(Exception):
        """The graph is there."""

    graphs = []

    def record(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)

        def run(*arguments: Any) -> Any:
            raise Traced

        return run

    builder.has_triton = torch.utils._triton.has_triton = lambda: True  # pyright: ignore[reportAttributeAccessIssue]
    config = mini("skc_8xh100")
    config = dataclasses.replace(config, model=changed(config.model, {"head.bias": True}))
    made: Any = engine("cuda", config, dtype="float32")
    ops.cross_entropy = lambda logits, targets, exact, cap=None, bias=None: cross_entropy(logits, targets, cap, bias)
    ops.scan = lambda decay, drive, start, exact: scan(decay, drive, start)

    made._model._attend = attention.CANDIDATES["torch's FlashAttention 2"].make().attend
    batch = batches(config, 1)[0]
    objective, (*arguments, _) = made.trace(batch, quantise=True)
    try:
        step = torch.compile(objective, backend=record, dynamic=False, fullgraph=True)
        step(*arguments, torch.tensor(attention.spans(batch.tokens, config.model.bos)))
    except Traced:
        pass
    text = "".join(module.code for graph in graphs for module in graph.modules() if hasattr(module, "code"))
    found = (text.count(name) for name in ("triton_kernel_wrapper_mutation(", "_varlen_attn("))
    return " ".join(map(str, (len(graphs), *found)))


class Run(NamedTuple):
    """What a process of `main` found."""

    arrays: Arrays
    messages: dict[str, str]

    def gaps(self, name: object, case: Case) -> dict[str, float]:
        """Return the relative RMS of each output of a case or fault; -log p(target) is as good as the logsumexp is."""
        wanted = expected(case)
        gaps = {key: relative_rms(self.arrays[f"{name}/{key}"], want) for key, want in wanted.items()}
        sizes = {key: float(np.linalg.norm(want)) for key, want in wanted.items()}
        gaps["nll"] *= sizes["nll"] / max(sizes["nll"], sizes["total"], 1e-30)
        return gaps


def run(device: str, folder: Path) -> Run:
    """Run `main` on a device."""
    return Run(*found_by("shared_tests.support.cross_entropy_cases", device, folder))


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else compile_and_trace()
