"""P1 to P4 of the tests on a device, by the tests' own functions: ops, kernels, optimizer rules, models, compiling.

Models are compared with PyTorch on the CPU, which the tests hold to the float64 oracle and to MLX. Which device an
engine takes is a process's matter: `python -m shared_tests.device.parity FILE STEPS PRESET ...` is that side.
"""

import os
import subprocess
import sys

import numpy as np

from core.check.tolerances import P1_FAST, P2_BFLOAT16, P2_FLOAT32, P3_FLOAT32, P4_FLOAT32, relative_rms
from core.engine.protocol import Arrays
from core.model.params import by_group
from core.training import schedule
from shared_tests.device.child import Child
from shared_tests.reference import optim as reference
from shared_tests.support import optimizer_cases
from shared_tests.support.harness import batches, draw, engine, mini, working_weights
from shared_tests.support.op_cases import OPS, fast_gaps, takes_exact
from shared_tests.support.twins import STORED, curve, outcome
from shared_tests.support.twins import by_group as joined

SIZES = (7, 130)
NARROW = ("relu2", "leaky_relu2", "silu", "rms_norm", "attention", "cross_entropy")
"""Ops that compute in bfloat16 on a GPU; the others always get float32."""
MODELS = ("debug", "baseline", "ternary_74m", "skc_8xh100", "skc_600")


def ops(child: Child) -> None:
    """P1: every op that has a fast form against its exact form on the device; kernels; P3: optimizer rules."""
    if child.backend == "cuda" and child.gpu:
        import torch

        torch.set_default_device("cuda")  # where the tests' functions put their arrays
    for op in OPS:
        for dtype in ("float32", "bfloat16") if op in NARROW else ("float32",):
            if takes_exact(child.backend, op):
                with child.part(f"P1 {op}, {dtype}"):
                    found = [fast_gaps(child.backend, op, n, dtype) for n in SIZES]
                    for what in found[0]:
                        limit = P1_FAST if dtype == "float32" else P2_BFLOAT16
                        child.check(f"P1 {op}, {dtype}, {what}", max(gaps[what] for gaps in found), limit)
    with child.part("P3 AdamW"):
        settings = optimizer_cases.SETTINGS
        oracle = reference.adamw(draw("param", 7, 5), [draw(f"grad/{s}", 7, 5) for s in range(20)], **settings)
        found = optimizer_cases.twenty_updates(child.backend, "float32")
        child.check("P3 AdamW, 20 updates", max(map(relative_rms, found, oracle)), P3_FLOAT32)
    for name, settings in optimizer_cases.MUON.items():
        with child.part(f"P3 Muon, {name}"):
            child.check(f"P3 Muon, {name}, 20 updates", _muon(child.backend, settings), P3_FLOAT32)
    if child.backend == "cuda" and child.only_gpu("kernels by their tests' cases"):
        _kernels(child)


def _muon(backend: str, settings: object) -> float:
    """Return the largest gap of 20 updates from the oracle, over the tests' shapes."""
    worst = 0.0
    for shape in optimizer_cases.SHAPES:
        found = optimizer_cases.twenty_of_muon(backend, "float32", shape, settings)  # type: ignore[arg-type]
        for i, start in enumerate(draw("param", 3, *shape)):
            grads = [optimizer_cases.grads_at(step, shape)[i] for step in range(20)]
            oracle = reference.muon(start, grads, 0.02, 0.1, 0.9, settings)  # type: ignore[arg-type]
            worst = max(worst, *(relative_rms(part[i], wanted) for part, wanted in zip(found, oracle, strict=True)))
    return worst


def _kernels(child: Child) -> None:
    """Run the cases of the kernels' own tests; fresh memory holds NaN."""
    import torch

    from backends.cuda.kernels import cross_entropy, scan
    from shared_tests.support import cross_entropy_cases, scan_cases

    torch.set_default_device(None)
    torch.use_deterministic_algorithms(True)
    with child.part("scan kernel"):
        for dtype, limit in scan_cases.LIMITS.items():
            cases = [case for case in scan_cases.CASES if case.dtype == dtype and case.rows]
            found = (scan_cases.gaps(case, scan_cases.outcome(scan.scan, case, "cuda")) for case in cases)
            child.check(f"scan kernel, {len(cases)} cases, {dtype}", max(max(g.values()) for g in found), limit)
    with child.part("cross-entropy kernel"):
        shares = []
        for case in cross_entropy_cases.CASES:
            arrays = {f"{case}/{k}": x for k, x in cross_entropy_cases.outcome(cross_entropy, case, "cuda").items()}
            gaps = cross_entropy_cases.Run(arrays, {}).gaps(case, case)
            shares += [gap / case.limit(output) for output, gap in gaps.items()]
        child.check(f"cross-entropy kernel, {len(cross_entropy_cases.CASES)} cases, share of limit", max(shares), 1.0)


def models(child: Child) -> None:
    """P2 and P4 of presets' minis: float32 and bfloat16 on the device against float64 on the CPU."""
    names, steps = (MODELS, 50) if child.gpu else (("debug", "skc_8xh100"), 5)
    file = child.temporary / "sample.npz"
    command = [sys.executable, "-m", "shared_tests.device.parity", str(file), str(steps), *names]
    subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    with np.load(file) as found:
        theirs = dict(found)
    child.turn()
    for name in names:
        with child.part(f"P2 {name}"):
            _model(child, name, theirs)
        if name not in STORED:
            with child.part(f"P4 {name}"):
                gap = np.abs(curve(child.backend, name, "float32", steps) - theirs[f"{name}/curve"]).max()
                child.check(f"P4 {name}: loss over {steps} steps, float32", float(gap), P4_FLOAT32)


def _model(child: Child, name: str, theirs: Arrays) -> None:
    config = mini(name)
    wanted = {key.removeprefix(f"{name}/"): value for key, value in theirs.items() if key.startswith(f"{name}/")}
    ours = joined(outcome(child.backend, config, 1.0, dtype="float32"), config)
    wide = {key: gap for key, value in ours.items() if (gap := relative_rms(value, wanted[key])) >= 0}
    for kind in ("activation", "gradients", "logits", "nll"):
        worst = max((gap, key) for key, gap in wide.items() if key.startswith(kind))
        child.check(f"P2 {name}: {kind} (worst: {worst[1]}), float32 to float64", worst[0], P2_FLOAT32)
    narrow = engine(child.backend, config, working_weights(config.model, 1.0), dtype="bfloat16")
    batch = batches(config, 1)[0]
    child.check(
        f"P2 {name}: logits, bfloat16", relative_rms(narrow.logits(batch.tokens), wanted["logits"]), P2_BFLOAT16
    )
    child.check(f"P2 {name}: nll, bfloat16", relative_rms(narrow.nll(*batch[:2]), wanted["nll"]), P2_BFLOAT16)


def sample(name: str, steps: int) -> Arrays:
    """Return what PyTorch computes here of a preset's mini in float64, and the curve of one that is kept in float."""
    config = mini(name)
    found = joined(outcome("cuda", config, 1.0, dtype="float64"), config)
    return found if name in STORED else {**found, "curve": curve("cuda", name, "float32", steps)}


def compiled(child: Child, preset: str) -> None:
    """Compare a compiled step with an eager one: loss, gradients by group, and the weights after an update."""
    config, found = mini(preset), {}
    batch, plan = batches(config, 1)[0], schedule.plan(0, 0.5, config.train)
    for dtype in ("float32", "bfloat16"):
        for form in (False, True):
            made = engine(child.backend, config, working_weights(config.model, 1.0), dtype=dtype, compile=form)
            objective, grads = made.gradients(batch)
            made.train_step(batch, plan).result()
            found[dtype, form] = {"loss": np.array(objective)} | {
                f"{what}, {group}": np.concatenate([of[name].ravel() for name in names])
                for what, of in (("gradients", grads), ("weights after an update", made.params()))
                for group, names in by_group(config.model).items()
            }
    child.turn()
    for what, eager in found["float32", False].items():
        limit = 10 * P2_FLOAT32 if what.startswith("weights") else P2_FLOAT32
        child.check(f"{what}, float32", relative_rms(found["float32", True][what], eager), limit)
        # In bfloat16 both round, each its own way: the compiled form must not be much farther from float32.
        ours, theirs = (relative_rms(found["bfloat16", form][what], eager) for form in (True, False))
        if what == "loss":
            child.check("loss, bfloat16 compiled to float32 eager", ours, P2_BFLOAT16)
        else:
            child.check(f"{what}, bfloat16: gap to float32, compiled over eager", ours / theirs, 2.0)


def main(file: str, steps: str, *names: str) -> None:
    """Write `sample` of presets to a file."""
    import torch

    torch.set_num_threads(min(4, torch.get_num_threads()))
    found = {f"{name}/{key}": value for name in names for key, value in sample(name, int(steps)).items()}
    np.savez(file, **found)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(*sys.argv[1:])
