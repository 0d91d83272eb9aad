"""What an accelerator is asked to compute, and what it is compared with, for core.device_check.

Models are compared with the PyTorch engine on the CPU, which the tests hold to the float64 oracle and to MLX. Each side
is a process of its own: `python -m core.device_cases`, which is not for people.
"""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import PYTHON, presets, rng, schedule
from core.config import RunConfig
from core.console import one_line
from core.engine import Arrays, Batch, DType, EngineOptions, load_engine
from core.parity import Check, perturbed

Say = Callable[[str], None]


def op_cases(n: int) -> Iterator[tuple[str, str, tuple, dict[str, Any]]]:
    """Yield (label, op, arguments, options) of every op that has a fast form, of size n."""

    def draw(name: str, *shape: int) -> np.ndarray:
        return rng.normal(0, f"device/{name}/{n}", int(np.prod(shape))).reshape(shape).astype(np.float32)

    x, places = 3 * draw("x", 2, 3, n), np.arange(n)
    for op in ("softmax", "logsumexp", "relu2", "leaky_relu2", "sigmoid", "silu", "decay"):
        yield op, op, (x,), {}
    yield "rms_norm", "rms_norm", (x, 1e-6), {}
    q, k, v = draw("q", 2, 4, n, 64), draw("k", 2, 2, n, 64), draw("v", 2, 2, n, 64)
    begun = np.cumsum(rng.integers16(0, f"device/documents/{n}", 2 * n).reshape(2, n) % 16 == 0, axis=1)
    mask = (places[:, None] >= places) & (begun[:, :, None] == begun[:, None])
    yield "attention, whole rows", "attention", (q, k, v, None), {}
    yield "attention, documents", "attention", (q, k, v, mask[:, None]), {}
    forget = (1 / (1 + np.exp(-4 * draw("decay", 2, n, 96)))).astype(np.float32)
    yield "scan", "scan", (forget, draw("drive", 2, n, 96), draw("start", 2, 96)), {}
    yield "softcap", "softcap", (10 * x, 30.0), {}
    logits, targets = 10 * draw("logits", 5, 9 * n), (np.arange(5) * (9 * n - 1) // 4).astype(np.int32)
    yield "cross_entropy", "cross_entropy", (logits, targets), {}
    yield "cross_entropy, softcapped", "cross_entropy", (logits, targets), {"cap": 15.0}


NARROW = ("relu2", "leaky_relu2", "silu", "rms_norm", "attention", "cross_entropy")
"""Ops that compute in bfloat16 on a GPU; the others always get float32."""


def ops(module: Any, mini: bool, say: Say) -> Iterator[Check]:
    """Yield P1: every op that has a fast form against its exact form on the device, kernels among them."""
    from shared_tests.tolerances import P1_FAST, P2_BFLOAT16

    say("P1: ops and kernels, fast form against exact form, outputs and gradients")
    cases: dict[str, list[tuple]] = {}
    for n in (7, 40) if mini else (7, 130, 1000):
        for label, *case in op_cases(n):
            cases.setdefault(label, []).append(tuple(case))
    for label, sizes in cases.items():
        narrow = sizes[0][0] in NARROW
        for dtype, limit in (("float32", P1_FAST), ("bfloat16", P2_BFLOAT16))[: 1 + narrow]:
            yield from tried(f"P1 {label}, {dtype}", _op(module, sizes, dtype, f"P1 {label}, {dtype}", limit))


def _op(module: Any, sizes: list[tuple], dtype: str, name: str, limit: float) -> Iterator[Check]:
    from shared_tests.tolerances import relative_rms

    worst = {"outputs": 0.0, "gradients": 0.0}
    for op, arguments, options in sizes:
        fast, exact = (module.outcome(op, arguments, options, form, dtype) for form in (False, True))
        for kind, ours, wanted in zip(worst, fast, exact, strict=True):
            gaps = (relative_rms(a, b) for a, b in zip(ours, wanted, strict=True))
            worst[kind] = max(worst[kind], *gaps)
    yield from (Check(f"{name}, {kind}", gap, limit) for kind, gap in worst.items())


def tried(what: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Yield the checks; if one cannot be made, a failed one that says so: what comes after it is to be seen too."""
    try:
        yield from checks
    except Exception as error:  # of a compiler, a driver, another process
        yield Check(f"{what}: {type(error).__name__}: {one_line(error)[:200]}", math.inf, 0.0)


def levels(backend: str, names: Sequence[str], steps: int, say: Say) -> Iterator[Check]:
    """Yield P2 and P4 of presets' minis: float32 and bfloat16 on the device against the CPU."""
    from shared_tests.tolerances import P2_BFLOAT16, P2_FLOAT32, P4_FLOAT32, relative_rms

    say(f"P2, P4: {len(names)} minis against PyTorch on the CPU, {steps} steps")
    theirs = _sampled("cuda", ("float64", "float32"), names, steps, CUDA_VISIBLE_DEVICES="")
    ours = _sampled(backend, ("float32", "bfloat16"), names, steps)
    for name in names:
        keys = [key for key in ours if key.startswith(f"float32/{name}/gradients/")]
        grads = [np.concatenate([of[key.replace("float32", kind)].ravel() for key in keys])
                 for of, kind in ((ours, "float32"), (theirs, "float64"))]  # fmt: skip
        yield Check(f"P2 {name}: gradients, float32 to float64", relative_rms(*grads), P2_FLOAT32)
        for what, dtype, limit in (("logits", "float32", P2_FLOAT32), ("logits", "bfloat16", P2_BFLOAT16),
                                   ("nll", "bfloat16", P2_BFLOAT16)):  # fmt: skip
            gap = relative_rms(ours[f"{dtype}/{name}/{what}"], theirs[f"float64/{name}/{what}"])
            yield Check(f"P2 {name}: {what}, {dtype} to float64", gap, limit)
        key = f"float32/{name}/curve"
        if key in ours:
            gap = float(np.abs(ours[key] - theirs[key]).max())
            yield Check(f"P4 {name}: loss over {steps} steps, float32", gap, P4_FLOAT32)


def _sampled(backend: str, dtypes: Sequence[DType], names: Sequence[str], steps: int, **environment: str) -> Arrays:
    """Return `sample` from a process of its own: which device an engine takes is a process's matter."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sample.npz"
        given = [backend, str(file), str(steps), ",".join(dtypes), *names]
        command = [*PYTHON, "-m", "core.device_cases", *given]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip().splitlines()[-1:]}")
        with np.load(file) as found:
            return dict(found)


def sample(backend: str, dtype: DType, names: Sequence[str], steps: int) -> Arrays:
    """Return what `backend` computes of these presets' minis: logits, losses, gradients; curves of those kept in float.

    Free-running curves of models with stored weights part by nature, and bfloat16 is not for curves.
    """
    found: Arrays = {}
    for name in names:
        config = presets.mini(presets.get(name).config)
        data, stored = _batches(config, steps), config.train.quantise != "never"
        options = EngineOptions(dtype=dtype, compile=False)
        engine = load_engine(backend, config, perturbed(config.model, 0), options, stored)
        found[f"{name}/logits"], found[f"{name}/nll"] = engine.logits(data[0].tokens), engine.nll(*data[0][:2])
        found |= {f"{name}/gradients/{key}": value for key, value in engine.gradients(data[0])[1].items()}
        if dtype == "float32" and not stored:
            found[f"{name}/curve"] = _curve(backend, config, options, data)
    return found


def _batches(config: RunConfig, count: int) -> list[Batch]:
    """Return batches of a mini: seven, over and over, so that there is something to learn."""
    rows, seq = config.train.batch, config.train.seq + 1
    drawn = [rng.integers16(0, f"device/batch/{i}", rows * seq).reshape(rows, seq) for i in range(min(count, 7))]
    tokens = [np.where(d % 13 == 0, config.model.bos, d % config.model.vocab).astype(np.int32) for d in drawn]
    return [Batch(tokens[i % 7][:, :-1], tokens[i % 7][:, 1:]) for i in range(count)]


def _curve(backend: str, config: RunConfig, options: EngineOptions, data: list[Batch]) -> np.ndarray:
    engine, train = load_engine(backend, config, options=options), config.train
    plans = [schedule.plan(step, schedule.progress_by_steps(step, train), train) for step in range(len(data))]
    pending = [engine.train_step(batch, plan) for batch, plan in zip(data, plans, strict=True)]
    return np.array([p.result().loss for p in pending])


def compiled(backend: str, names: Sequence[str], wanted: bool, say: Say) -> Iterator[Check]:
    """Compare compiled and eager steps; of models with stored weights the first one, before codes can differ."""
    from shared_tests.tolerances import P2_FLOAT32

    say(f"compiled against eager: {', '.join(names)}" + ("" if wanted else " (mini: eager both, nothing is compiled)"))
    for name in names:
        config = presets.mini(presets.get(name).config)
        data = _batches(config, 3 if config.train.quantise == "never" else 1)
        options = (EngineOptions(dtype="float32", compile=compile) for compile in (wanted, False))
        ours, eager = (_curve(backend, config, option, data) for option in options)
        yield Check(f"compiled against eager, {name}: loss", float(np.abs(ours - eager).max()), P2_FLOAT32)


def main(backend: str, file: str, steps: str, dtypes: str, *names: str) -> None:
    """Write `sample` in every type to a file."""
    found: Arrays = {}
    for dtype in dtypes.split(","):
        made = sample(backend, dtype, names, int(steps))  # pyright: ignore[reportArgumentType]
        found |= {f"{dtype}/{key}": value for key, value in made.items()}
    np.savez(file, **found)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(*sys.argv[1:])
