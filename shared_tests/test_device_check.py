"""scripts/gpu_check and scripts/mac_check on the CPU: reports, refusals, and that faults fail. Budget: 40 s.

Their --mini form runs the code that an accelerator runs; the time goes into the processes that it starts.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import device_cases, device_check, presets
from core.bench import BenchError
from core.config import RunConfig
from core.device_check import examine, fitting, run
from shared_tests.harness import module

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ("P1 attention, documents, bfloat16, gradients", "P1 scan, float32, gradients", "P2 skc_8xh100: gradients, ",
          "P1 cross_entropy, softcapped, bfloat16, gradients", "P2 debug: logits, bfloat16", "P4 debug: loss over 3 ",
          "compiled against eager, debug: loss")  # fmt: skip


def start(name: str, *options: str) -> subprocess.CompletedProcess:
    """Run a script outside the checkout, as someone without a GPU would."""
    command = [sys.executable, str(ROOT / "scripts" / name), *options]
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=hidden)


@pytest.mark.parametrize("name, options", [("gpu_check", ()), ("mac_check", ("--bench",))])
def test_a_small_run_checks_everything_and_writes_both_reports(
    name: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    done = start(name, "--mini", "--out", str(tmp_path), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    text, found = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert text in done.stdout and found["ok"] and f"`scripts/{name} --mini" in text
    names = [check["name"] for check in found["checks"]]
    for wanted in CHECKS:
        assert any(check.startswith(wanted) for check in names), (wanted, names)
        assert f"| {wanted}" in text
    assert any(check["gap"] > 0 for check in found["checks"]) and all(c["limit"] > 0 for c in found["checks"])
    if name == "gpu_check":
        assert set(found["forms"]) == {"isolated", "packed"} and found["forms"]["packed"]["cuDNN"] == "no CUDA device"
        assert [speed["report"]["preset"] for speed in found["speeds"]] == ["baseline"]
        assert "| baseline | 4 | " in text and "* baseline: compile: off (eager); attention: torch" in text


@pytest.mark.parametrize("name, word", [("gpu_check", "CUDA device"), ("mac_check", "GPU with Metal")])
def test_without_an_accelerator_it_is_one_line_and_exit_2(name: str, word: str, tmp_path: Path) -> None:
    if sys.platform == "darwin" and name == "mac_check":
        pytest.skip("here is one")
    done = start(name, "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert done.stderr == f"there is no {word} here: nothing was checked (--mini tries the script on the CPU)\n"


@pytest.fixture
def ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes processes and engines, and a GPU: these tests are about the report."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(device_check, "levels", lambda *given: iter(()))
    monkeypatch.setattr(device_check, "compiled", lambda *given: iter(()))


def failed(backend: str) -> list[str]:
    found = examine(backend, "test", mini=True, benched=(), say=lambda line: None)
    assert found is not None and found.ok == all(check.ok for check in found.checks)
    return [check.name for check in found.checks if not check.ok]


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_a_fault_in_an_op_fails_its_checks_only(backend: str, ops_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(backend) == []
    ops = module(backend, "ops")
    right, scan = ops.softcap, ops.recurrence.scan
    monkeypatch.setattr(ops, "softcap", lambda x, cap, exact: right(x, cap if exact else 1.0001 * cap, exact))
    outputs = [f"P1 {name}, float32, outputs" for name in ("softcap", "cross_entropy, softcapped")]
    assert set(outputs) <= set(found := failed(backend)) and all("soft" in name for name in found)
    monkeypatch.setattr(ops, "softcap", right)
    relu2, still = ops.relu2, (lambda x: x.detach()) if backend == "cuda" else ops.mx.stop_gradient
    monkeypatch.setattr(ops, "relu2", lambda x, exact: relu2(x if exact else 2 * still(x) - x, exact))
    assert failed(backend) == [f"P1 relu2, {dtype}, gradients" for dtype in ("float32", "bfloat16")]
    monkeypatch.setattr(ops, "relu2", relu2)
    monkeypatch.setattr(ops.recurrence, "scan", lambda decay, drive, start: scan(decay, drive, 0 * start))
    assert failed(backend) == ["P1 scan, float32, outputs", "P1 scan, float32, gradients"]


def test_what_cannot_be_run_is_a_failed_check_and_the_others_are_made(
    ops_only: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(module("cuda", "ops").recurrence, "scan", broken)
    monkeypatch.setattr(device_check, "levels", device_cases.levels)
    monkeypatch.setattr(
        device_cases.subprocess,
        "run",
        lambda *given, **options: subprocess.CompletedProcess([], 1, "", "x\nout of memory"),
    )
    monkeypatch.setattr(device_check, "run_bench", lambda *given, **options: broken_bench())
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--mini", "--out", str(tmp_path)])
    assert run("cuda", "CUDA device", None) == 1
    found = json.loads((tmp_path / "report.json").read_text())
    bad = {check["name"]: check["gap"] for check in found["checks"] if check["gap"] is None}
    assert len(bad) == 3 and len(found["checks"]) > 40 and not found["ok"]
    assert "P1 scan, float32: RuntimeError: no kernel image for this device" in bad
    assert any(name.startswith("P2, P4: RuntimeError") and "out of memory" in name for name in bad)
    assert "timing baseline: bench: the process ended" in bad
    assert "**BEYOND**" in capsys.readouterr().out


def of_eight_rows() -> RunConfig:
    """Return a run of 512 rows a step, 8 a micro-batch."""
    config = presets.get("baseline").config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch=512, micro_batch=8))


def broken_bench() -> None:
    """Fail as a benchmark whose worker died."""
    raise BenchError("bench: the process ended")


def test_the_micro_batch_is_fitted_to_the_memory() -> None:
    config = of_eight_rows()
    gib = 2.0**30
    assert fitting(config, 10 * gib, 80 * gib) == 32, "0.8 of 80 GiB hold 51 rows of 1.25 GiB"
    assert fitting(config, 4 * gib, 140 * gib) == 64, "never above 64"
    assert fitting(config, 100 * gib, 80 * gib) == 4
    odd = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=24))
    assert fitting(odd, 10 * gib, 80 * gib) == 8, "it divides the batch"


def test_two_sizes_are_timed_and_one_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = [], []

    def bench(config: Any, **options: Any) -> Any:
        asked.append(config.train.rows)
        if config.train.rows > 8:
            raise BenchError("bench: the process ended")
        row = dataclasses.make_dataclass("Row", ["peak_bytes"])(1e9)
        return dataclasses.make_dataclass("Report", ["rows", "preset"])((row,), config.preset)

    monkeypatch.setattr(device_check, "run_bench", bench)
    device = {"name": "NVIDIA H200", "memory": 150e9}
    found = device_check._speeds("cuda", of_eight_rows(), device, 1e15, False, said.append)
    assert asked == [8, 64] and [(s.micro_batch, s.published) for s in found] == [(8, 989e12)]
    assert said[-1] == "micro-batches of 64 rows do not fit: bench: the process ended"


def test_samples_are_the_same_on_both_backends() -> None:
    ours, theirs = (device_cases.sample(backend, "float32", ["debug"], 3) for backend in ("mlx", "cuda"))
    assert ours.keys() == theirs.keys() and "debug/curve" in ours
    assert all(np.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)
