"""What support.kills kills: a tiny run with everything on that has a state, and the process that trains it."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backends.mlx.blas import load_fast_blas
from core import presets
from core.config import DataConfig, RunConfig, changed
from core.data.bundled import BUNDLED
from core.data.dataset import open_dataset
from core.data.prepare import prepare
from core.engine.loading import load_engine
from core.engine.protocol import EngineOptions
from core.training.loop import train
from core.training.run import Checkpoint, Run
from core.training.writer import hold

PLACES = ("write", "fsync", "rename", "copy")
"""Where a child can kill itself while it saves a checkpoint: in the middle of the write, or just before the others."""


def small_data(folder: Path, count: int = 300) -> str:
    """Prepare `count` short documents with the bundled tokenizer in `folder`/data and return that path."""
    lines = [
        {"text": f"Number {i}: the cat that was number {i * 7 % 97} sat on mat {i * i % 89}."} for i in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare([str(folder / "text.jsonl")], str(folder / "data"), tokenizer=str(BUNDLED / "tokenizer.model"))
    return str(folder / "data")


def everything(data: str, **changes: Any) -> RunConfig:
    """Return a tiny ternary run of 16 steps with Muon, rows that grow, averages and late quantisation.

    The row length changes at steps 4 and 8, averaging starts at step 7 and quantisation at step 9, in the middle of
    the warm-down; steps 6 and 12 are kept.
    """
    base = presets.get("ablate").config
    model = changed(
        base.model,
        {
            "dim": 32,
            "layers": 1,
            "attention.heads": 2,
            "attention.kv_heads": 1,
            "attention.rope_dims": 8,
            "mlp.hidden": 64,
        },
    )
    fields: dict[str, Any] = {
        "steps": 16, "batch": 4, "seq": 32, "seq_stages": (8, 16), "seq_until": (0.25, 0.5), "warmdown": 0.6,
        "matrix_rule": "muon", "muon_iterations": 3, "muon_momentum_steps": 10,
        "quantise": "late", "quantise_below": 0.7, "average_from": 0.45, "average_decay": 0.9,
        "mtp_heads": 2, "snapshot_every": 3, "snapshot_below": 0.7,
        "log_every": 1, "eval_every": None, "save_every": 2, "keep_every": 3,
    }  # fmt: skip
    return dataclasses.replace(
        base,
        model=model,
        data=DataConfig(data),
        train=dataclasses.replace(base.train, **{**fields, **changes}),
        eval=dataclasses.replace(base.eval, seq=32, batch=64, train_documents=2, documents=2),
    )


def fingerprint(saved: Checkpoint) -> str:
    """Return the sha256 of a checkpoint's step, weights and optimizer state, with their names."""
    state = hashlib.sha256(f"{saved.step} {saved.quantise}".encode())
    for side in (saved.params, saved.optimizer):
        for name, value in sorted(side.items()):
            state.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return state.hexdigest()


def timeless(run: Run) -> list[dict[str, Any]]:
    """Return the metrics without what the clock says."""
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "clock/"))} for row in run.metrics()]


def marks_of(run: Path) -> Path:
    """Return the file beside the run in which the child says where it is."""
    return run.with_name(f"{run.name}.marks")


def child(backend: str, path: str, data: str, die: str) -> None:
    """Train run `path` to its end, and keep PATH.marks: T when training starts, ( and ) around every save.

    `die` is "" or PLACE:N, the N-th time that it comes to that place of PLACES it kills itself.
    """
    fix_threads(backend)
    config, dataset = everything(data), open_dataset(data)
    engine = load_engine(backend, config, options=EngineOptions(dtype="float32", compile=False))
    lock = hold(path)
    lock.__enter__()  # until the process ends
    run = Run.create(path, config, dataset.tokenizer.model, {"name": dataset.name})
    run.record_environment({"data": {"name": dataset.name}})
    marks, save = os.open(marks_of(run.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT), run.save

    def marked_save(*arguments: Any) -> None:
        os.write(marks, b"(")
        save(*arguments)
        os.write(marks, b")")

    setattr(run, "save", marked_save)  # noqa: B010
    if die:
        place, _, count = die.partition(":")
        arm(place, int(count), str(run.checkpoint_path))
    os.write(marks, b"T")
    train(run, engine, dataset, lambda line: None)


def fix_threads(backend: str) -> None:
    """Compute on one thread of the CPU, so that the same numbers are added in the same order."""
    if backend == "mlx":
        load_fast_blas()  # before anything imports MLX
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
    else:
        import torch

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)


def arm(place: str, count: int, target: str) -> None:
    """Make this process kill itself the `count`-th time that it comes to `place` of saving checkpoint `target`."""
    visits = itertools.count(1)
    handles: set[int] = set()
    """Of the fresh files that take the target's place when they are whole."""

    def visit() -> None:
        if next(visits) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    class HalfWritten(io.FileIO):
        def write(self, data: Any) -> int:
            half = super().write(data[: len(data) // 2])
            visit()
            return half + super().write(data[half:])

    def before(function: Callable[..., Any], concerns: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if concerns(*arguments):
                visit()
            return function(*arguments)

        return call

    opened, wrapped = os.open, os.fdopen

    def open_noted(path: Any, flags: int, *mode: int) -> int:
        fresh = flags & os.O_EXCL and str(path).startswith(f"{target}.")
        if place == "copy" and flags & os.O_EXCL and "/step-" in str(path):
            visit()
        handle = opened(path, flags, *mode)
        (handles.add if fresh else handles.discard)(handle)
        return handle

    os.open = open_noted
    if place == "write":
        os.fdopen = lambda handle, *mode: (HalfWritten if handle in handles else wrapped)(handle, *mode)
    elif place == "fsync":
        os.fsync = before(os.fsync, lambda handle: handle in handles)
    elif place == "rename":
        os.replace = before(os.replace, lambda source, end: str(end) == target)


def debug_data(tmp_path: Path) -> list[str]:
    """Return options of a short run of real steps."""
    data = small_data(tmp_path / "text", 60)
    return ["--data.path", data, "--backend", "cuda", "--out", str(tmp_path / "run"), "--train.steps", "6"]
