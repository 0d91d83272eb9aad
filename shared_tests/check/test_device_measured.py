"""What gpu_check and mac_check measure, on the CPU: a fault fails its checks and no others. Budget: 15 s."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.mlx.device import Chip
from shared_tests.device import records
from shared_tests.device.child import Child
from shared_tests.device.plan import Item

MEASURED = Item("measured", "test.measured", 90.0)


def measured(call: Callable[[Child], Any], folder: Path) -> list[records.Line]:
    """Return the lines of an item that runs in this process."""
    call(Child("cuda", MEASURED, folder, folder, False))
    return records.read(folder)


@pytest.mark.parametrize("fault", ["", "softcap", "relu2", "scan", "muon"])
def test_a_fault_in_an_op_fails_its_checks_only(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.cuda import ops, optim
    from shared_tests.device import parity

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    kept = ("softcap", "relu2", "scan")
    monkeypatch.setattr(parity, "OPS", kept)
    right, relu2, scan, muon = ops.softcap, ops.relu2, ops.recurrence.scan, optim.newton_schulz
    wrong: dict[str, tuple[Any, str, Any]] = {
        "softcap": (ops, "softcap", lambda x, cap, exact: right(x, cap if exact else 1.0001 * cap, exact)),
        "relu2": (ops, "relu2", lambda x, exact: relu2(x if exact else 2 * x.detach() - x, exact)),
        "scan": (ops.recurrence, "scan", lambda decay, drive, start: scan(decay, drive, 0 * start)),
        "muon": (optim, "newton_schulz", lambda x, *more: 1.001 * muon(x, *more)),
    }
    if fault:
        monkeypatch.setattr(*wrong[fault])
    lines = measured(parity.ops, tmp_path)
    failed = {line["what"].split(", 20")[0] for line in lines if line.get("ok") is False}
    assert failed == {
        "": set(), "softcap": {f"P1 softcap, float32, {what}" for what in ("outputs", "gradients")},
        "relu2": {f"P1 relu2, {dtype}, gradients" for dtype in ("float32", "bfloat16")},
        "scan": {f"P1 scan, float32, {what}" for what in ("outputs", "gradients")},
        "muon": {f"P3 Muon, {name}" for name in ("plain", "rows", "rms", "polar express")},
    }[fault]  # fmt: skip
    assert sum("ok" in line for line in lines) == 2 * len(kept) + 2 + 5 and not any("error" in line for line in lines)


def test_a_model_that_computes_something_else_fails(tmp_path: Path) -> None:
    from shared_tests.device import parity

    theirs = {f"debug/{key}": value for key, value in parity.sample("debug", 2).items()}
    child = Child("cuda", MEASURED, tmp_path, tmp_path, False)
    parity._model(child, "debug", theirs)
    theirs["debug/logits"] = 1.03 * theirs["debug/logits"]
    theirs["debug/gradients vector"] = 1.00001 * theirs["debug/gradients vector"]
    honest = len(records.read(tmp_path))
    parity._model(child, "debug", theirs)
    lines = records.read(tmp_path)
    assert honest == 6 and all(line["ok"] for line in lines[:6])
    assert [line["what"][:18] for line in lines[6:] if not line["ok"]] == [
        "P2 debug: gradient", "P2 debug: logits (", "P2 debug: logits, ",
    ]  # fmt: skip


def test_bits_are_counted() -> None:
    import torch

    from shared_tests.device.quantiser import different

    a = torch.tensor([0.0, 1.0, 2.0, float("nan")])
    assert different(a, a) == 0 and different(a, torch.tensor([-0.0, 1.0, 2.0000002, float("nan")])) == 2


def test_the_plain_model_is_the_baseline() -> None:
    import torch

    from core import presets
    from shared_tests.device.plain import Plain

    preset = presets.get("baseline")
    with torch.device("meta"):
        made = Plain(preset.config.model, 8, torch.bfloat16)
    assert sum(p.numel() for p in made.parameters()) == preset.params


def test_a_float64_engine_that_moves_the_process_fails_the_smoke_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx

    from shared_tests.device import smoke

    child = Child("mlx", MEASURED, tmp_path, tmp_path, False)
    smoke.beside(child)
    assert [line["ok"] for line in records.read(tmp_path)] == [True] * 3
    places = [mx.Device(mx.gpu)]  # before, and then the engines' own device
    monkeypatch.setattr(mx, "default_device", lambda: places.pop() if places else mx.Device(mx.cpu))
    monkeypatch.setattr("backends.mlx.device.chip", lambda: Chip(False, False, "CPU"))
    smoke.beside(child)
    assert [line["ok"] for line in records.read(tmp_path)[3:]] == [False, True, True]
