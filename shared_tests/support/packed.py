"""Packed programs as a stranger runs them, the same runs by the checkout, and the kernels out of a program.

`python -m shared_tests.support.packed run CONFIG BACKEND FOLDER` is a rank of the checkout's run; `... kernels PROGRAM
FILE` runs the cases of every kernel of a program by Triton's interpreter, `... compile PROGRAM` compiles them.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import ROOT, presets
from core.config import RunConfig, changed, from_json, to_json
from core.console import Console
from core.submission.pack import Form, pack_program
from core.verbs.common import Context
from core.verbs.train import Train, train_run
from shared_tests.support.ranked import environments

STRANGER = [sys.executable, "-S", "-W", "ignore"]
"""Python without the files in site-packages that lead to this checkout."""
KERNELS = ("scan", "cross_entropy")
LORA = {
    "eval.windows": "documents", "eval.seq": 32, "eval.adapt.kind": "lora", "eval.adapt.rank": 2,
    "eval.adapt.chunk": 16, "eval.adapt.sites": ("mixer", "head"), "eval.adapt.documents": 4, "eval.round": 2,
}  # fmt: skip
SKC = {"train.average_from": 0.5, "train.weight_decay": 0.01, **LORA}
ATTENTION = {
    **LORA, "eval.adapt.sites": ("q", "v", "head"), "eval.adapt.warm_a": True, "eval.adapt.documents": 1,
    "eval.round": 1, "eval.phases.at": (0.5,), "eval.phases.chunk": 16, "export.calibration_tokens": 256,
    "export.budget": 170_000, "export.code_bytes": 1000,
}  # fmt: skip


def tiny(preset: str, data: str, **fields: Any) -> RunConfig:
    """Return 20 recorded steps of a preset's mini on `data`, whose tokens are of the bundled tokenizer."""
    config = presets.mini(presets.get(preset).config)
    given = {"data.path": data, "model.vocab": 1024, "train.steps": 20, "train.log_every": 1, "train.save_every": None}
    return changed(config, {**given, "train.eval_every": None, "eval.documents": None, **fields})


def environment(**variables: str) -> dict[str, str]:
    """Return a stranger's environment: the packages of this one, and nothing of the checkout."""
    left = ("PYTHONPATH", "PYTHONSAFEPATH", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in left and "PYTEST" not in name}
    return {**kept, "PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1", **variables}


def start(program: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, alone."""
    return subprocess.run(
        [*STRANGER, str(program)],
        cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def seats(backend: str, world: int, folder: Path) -> list[dict[str, str]]:
    """Return what a launcher sets for each of some ranks on this machine: nothing for one."""
    return environments(backend, world, folder) if world > 1 else [{}]


def together(command: list[str], folder: Path, places: list[dict[str, str]], **variables: str) -> None:
    """Run a command on several ranks; AssertionError with what a rank said that did not end well."""
    ranks = [
        subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment(**variables), **place},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for place in places
    ]  # fmt: skip
    said = [rank.communicate(timeout=400)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), [words[-2000:] for words in said]


def by_checkout(config: RunConfig, backend: str, folder: Path) -> None:
    """Do with the checkout what a program of these settings does, in float32."""
    options = dataclasses.replace(Train.of(config), backend=backend, dtype="float32", out=str(folder))  # pyright: ignore
    assert train_run(options, Context(Console(True), "skc train")).ok


def result(folder: Path) -> dict[str, Any]:
    """Return what has to be the same bit for bit: losses, the scores' nats, and the artifact."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = {name: value for row in rows for name, value in row.items() if name.startswith("final/")}
    return {
        "losses": [row["train/loss"] for row in rows if "train/loss" in row],
        "nats": [final[name]["nats"] for name in ("final/score", "final/plugins") if name in final],
        "exported": {k: v for k, v in final["final/artifact"]["score"].items() if k != "bpb_raw"},  # by a manifest
        "artifact": hashlib.sha256((folder / "artifact.skc").read_bytes()).hexdigest(),
    }


def skc(data: str) -> RunConfig:
    """Return ternary weights, engram with rows left out, bank, averages, adapters, and an artifact in codes."""
    config = tiny("skc_8xh100", data, **SKC)
    assert config.model.engram.keep and config.model.bank.places and "skc" in config.model.blocks
    return config


def attention(data: str) -> RunConfig:
    """Return the record's loops, lanes and smear, phases of adaptation, steps that GPTQ fits to what is left."""
    return tiny("pr1855", data, **ATTENTION)


def written(folder: Path, config: RunConfig, backend: str = "cuda", form: Form = "text") -> Path:
    """Write the program of some settings, in float32, into a folder."""
    file = folder / "train_gpt.py"
    file.write_bytes(pack_program(config, backend, form, dtype="float32", micro_tokens=None))
    return file


def same(
    config: RunConfig, folder: Path, form: Form = "text", world: int = 1, backend: str = "cuda",
    python: Sequence[str] = STRANGER,
) -> dict[str, Any]:  # fmt: skip
    """Run a program by `python`, and the checkout, and return what both have come to: the same."""
    program, room = written(folder, config, backend, form), folder / "room"
    room.mkdir()
    variables = {"DATA_PATH": config.data.path, "RUN_ID": "one"}
    variables |= {} if python is STRANGER else {"PYTHONPATH": ""}
    together([*python, str(program)], room, seats(backend, world, folder), **variables)
    checkout = changed(config, {"export.code_bytes": len(program.read_bytes())})
    ours = [sys.executable, "-W", "ignore", "-m", "shared_tests.support.packed", "run", as_json(checkout)]
    together([*ours, backend, str(folder / "checkout")], Path(ROOT), seats(backend, world, folder))
    found = result(room / "runs" / "one")
    assert found == result(folder / "checkout")
    assert len(found["losses"]) == 20 and found["losses"][-1] < found["losses"][0]
    return found


def kernels_of(program: str) -> list[str]:
    """Take a program's kernels in place of the checkout's and return their names."""
    runpy.run_path(program, run_name="packed")
    finder: Any = sys.meta_path.pop(0)  # of all else the cases take the checkout's
    taken = []
    for name in KERNELS:
        spec = finder.find_spec(f"backends.cuda.kernels.{name}")
        if spec is not None:
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            taken.append(name)
            setattr(importlib.import_module("backends.cuda.kernels"), name, module)
    return taken


def main(task: str, *given: str) -> None:
    """Do what the command line asks for."""
    if task == "run":
        by_checkout(from_json(RunConfig, json.loads(given[0])), given[1], Path(given[2]))
        return
    taken = kernels_of(given[0])
    from shared_tests.support import cross_entropy_cases, scan_cases

    if task == "compile":
        cross_entropy_cases.trace = lambda: ""  # it takes a whole engine
        compilers = {"scan": scan_cases.compile_for_h100, "cross_entropy": cross_entropy_cases.compile_and_trace}
        for name in taken:
            compilers[name]()
        return
    import torch

    torch.set_num_threads(1)
    np.seterr(all="ignore")
    found: dict[str, Any] = {}
    if "scan" in taken:
        from backends.cuda.kernels import scan

        for case in scan_cases.CASES:
            found |= {f"scan {case}/{key}": x for key, x in scan_cases.outcome(scan.scan, case, "cpu").items()}
    if "cross_entropy" in taken:
        from backends.cuda.kernels import cross_entropy

        for case in cross_entropy_cases.CASES:
            outcome = cross_entropy_cases.outcome(cross_entropy, case, "cpu")
            found |= {f"cross_entropy {case}/{key}": x for key, x in outcome.items()}
    np.savez(given[1], **found)  # pyright: ignore[reportArgumentType]


def as_json(config: RunConfig) -> str:
    """Return settings as an argument of `run`."""
    return json.dumps(to_json(config))


if __name__ == "__main__":
    main(*sys.argv[1:])
