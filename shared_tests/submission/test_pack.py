"""The packed program: what the checkout computes, bit for bit, where nothing of the checkout can be imported."""

import hashlib
import json
import os
import py_compile
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import presets
from core.cli import main
from core.config import RunConfig, changed
from core.submission.pack import Form, pack
from core.verbs.pack import TARGETS
from shared_tests.support import cross_entropy_cases, packed, scan_cases
from shared_tests.support.killed import small_data

LORA = {
    "eval.windows": "documents", "eval.seq": 32, "eval.adapt.kind": "lora", "eval.adapt.rank": 2, "eval.adapt.chunk": 16,
    "eval.adapt.sites": ("q", "v", "head"), "eval.adapt.documents": 4, "eval.round": 2,
}  # fmt: skip
SKC = {"train.average_from": 0.5, "train.weight_decay": 0.01, **LORA, "eval.adapt.sites": ("mixer", "head")}
ATTENTION = {**LORA, "eval.adapt.warm_a": True, "eval.phases.at": (0.5,), "export.calibration_tokens": 256}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_data(tmp_path_factory.mktemp("text"), 60)


def written(folder: Path, config: RunConfig, backend: str = "cuda", form: Form = "text") -> Path:
    file = folder / "train_gpt.py"
    file.write_bytes(pack(config, backend, form, dtype="float32", micro_tokens=None))
    return file


def same(config: RunConfig, folder: Path, backend: str = "cuda", form: Form = "text", world: int = 1) -> dict[str, Any]:
    """Run a program and the checkout and return what both have come to."""
    program, room = written(folder, config, backend, form), folder / "room"
    room.mkdir()
    size, variables = len(program.read_bytes()), {"DATA_PATH": config.data.path, "RUN_ID": "one"}
    checkout = changed(config, {"export.code_bytes": size})
    if world == 1:
        done = packed.start(program, room, **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        places = [{"OMP_NUM_THREADS": "1"}]
    else:
        packed.together([*packed.STRANGER, str(program)], room, packed.seats(world), **variables)
        places = packed.seats(world)
    root = str(Path(__file__).parents[2])
    ours = [sys.executable, "-W", "ignore", "-m", "shared_tests.support.packed", "run", packed.as_json(checkout)]
    packed.together([*ours, backend, str(folder / "checkout")], Path(root), places)
    found = packed.result(room / "runs" / "one")
    assert found == packed.result(folder / "checkout")
    assert len(found["losses"]) == 20 and found["losses"][-1] < found["losses"][0]
    return found


def test_an_skc_program_computes_what_the_checkout_does(data: str, tmp_path: Path) -> None:
    """Ternary weights, engram with rows left out, bank, averages, adapters, and an artifact in codes."""
    config = packed.tiny("skc_8xh100", data, **SKC)
    assert config.model.engram.keep and config.model.bank.places and "skc" in config.model.blocks
    found = same(config, tmp_path)
    log = (tmp_path / "room" / "logs" / "one.txt").read_text()
    program = (tmp_path / "train_gpt.py").read_bytes()
    assert f"code_sha256: {hashlib.sha256(program).hexdigest()}\n" in log and f"code_bytes: {len(program)}\n" in log
    assert f"artifact_sha256: {found['artifact']}\n" in log and len(found["nats"]) == 2
    words = program + log.encode() + (tmp_path / "room" / "runs" / "one" / "env.json").read_bytes()
    for name in (os.path.expanduser("~"), os.uname().nodename, str(tmp_path), packed.__file__):
        assert name.encode() not in words, name


def test_an_attention_program_computes_what_the_checkout_does(data: str, tmp_path: Path) -> None:
    """The record's loops, lanes and smear, phases of adaptation, steps that GPTQ fits to the budget; as a zip file."""
    budget = 240_000  # so tight that steps are chosen by it, and by the program's own bytes
    config = packed.tiny("pr1855", data, **ATTENTION, **{"export.budget": budget, "export.fit": False})
    same(config, tmp_path, form="zip")
