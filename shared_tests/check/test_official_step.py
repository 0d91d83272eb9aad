"""The stand-in for the official MLX step has the official losses, step after step. Budget: 5 s (10 s with `long`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from shared_tests.support import official_step
from shared_tests.support.official_files import RECIPE, ROOT, drawn

GOLDEN = json.loads(Path(ROOT / "shared_tests/golden/official_losses.json").read_text())["losses"]
CLOSE, FAR = 1e-5, 1e-4


def losses(name: str) -> list[float]:
    """Return what the stand-in says of a size of the recipe before each step."""
    size = RECIPE.SIZES[name]
    step = official_step.OfficialStep(drawn(name), size.layers, size.heads)
    batch = [mx.array(part) for part in RECIPE.tokens(name)]
    return [step(*batch) for _ in range(RECIPE.STEPS)]


@pytest.mark.parametrize("name", ["mini", pytest.param("full", marks=pytest.mark.long)])
def test_the_stand_in_has_the_official_losses(name: str) -> None:
    np.testing.assert_allclose(losses(name), GOLDEN[name]["mlx_steps"], rtol=0, atol=CLOSE)
    assert GOLDEN[name]["mlx_steps"][0] == GOLDEN[name]["mlx"]


@pytest.mark.parametrize(
    "fault",
    [
        {"EPS": 1.2e-7}, {"ROTATION": 9e3}, {"CAP": 29.0}, {"RATE": 0.041}, {"EMBED_RATE": 0.051}, {"ITERATIONS": 4},
        {"FIRST_MOMENTUM": 0.8}, {"MOMENTUM_STEPS": 50},
    ],
)  # fmt: skip
def test_a_wrong_setting_of_the_stand_in_is_seen(fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fault.items():
        monkeypatch.setattr(official_step, name, value)
    assert np.abs(np.subtract(losses("mini"), GOLDEN["mini"]["mlx_steps"])).max() > FAR


@pytest.mark.parametrize("given, code, words", [
    ((), 0, "ratio "), (("--heads", "3"), 2, "bench_official: error: model.dim=64 is not divisible by model."),
    (("--heads", "0"), 2, "bench_official: error: model.attention.heads=0"),
])  # fmt: skip
def test_the_command_compares_and_refuses(given: tuple[str, ...], code: int, words: str) -> None:
    size = ("--layers", "2", "--dim", "64", "--rows", "1", "--seq", "32", "--rounds", "1")
    command = [sys.executable, str(ROOT / "scripts" / "bench_official"), *size, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr and "Traceback" not in done.stderr
