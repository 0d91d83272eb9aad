"""What the MLX engine makes of a chip: types, micro-batches, memory, a device of its own. Budget: 20 s.

There is no GPU here: `device.chip` says that there is one, as Macs and NVIDIA's cards describe themselves, and the ops
run on the CPU all the same.
"""

import dataclasses
import gc
import inspect
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from backends.mlx import device
from backends.mlx.device import Chip, OnTheCPU, check_memory, keep_resident, micro_batch, products, value_and_grad
from backends.mlx.model import Model
from core import presets
from core.check.tolerances import P2_FLOAT16, P2_FLOAT64, P3_FLOAT32, relative_rms
from core.cli import _parse
from core.config import ConfigError, RunConfig
from core.console import Console
from core.engine.fitting import fitting
from core.engine.loading import load_engine
from core.engine.measured import Measured
from core.engine.protocol import EngineOptions, Tape
from core.engine.ranks import Alone
from core.training import schedule
from core.verbs.common import Context
from core.verbs.train import Train, train_run
from shared_tests.support.harness import batches, engine, mini, working_weights

GB = 1e9
M1 = Chip(True, True, "Apple M1", "applegpu_g13g", 5.7 * GB, 8.6 * GB)
M2_ULTRA = Chip(True, True, "Apple M2 Ultra", "applegpu_g14d", 144 * GB, 206 * GB)
M3_MAX = Chip(True, True, "Apple M3 Max", "applegpu_g15s", 51 * GB, 69 * GB)
M4 = Chip(True, True, "Apple M4", "applegpu_g16g", 11.8 * GB, 17.2 * GB)
M5 = Chip(True, True, "Apple M5", "applegpu_g17g", 17.8 * GB, 25.8 * GB)
H100 = Chip(True, False, "NVIDIA H100 80GB HBM3", "sm_90", 85 * GB, 85 * GB, 9)
T4 = Chip(True, False, "Tesla T4", "sm_75", 16 * GB, 16 * GB, 7)
CPU = Chip(False, False, "CPU")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that puts a chip in the place of this machine's."""
    return lambda chip: monkeypatch.setattr(device, "chip", lambda: chip)


# What a chip says of itself.


@pytest.mark.parametrize(
    "chip, dtype",
    [
        (M1, "float32"), (M2_ULTRA, "float32"), (M3_MAX, "bfloat16"), (M4, "bfloat16"), (M5, "bfloat16"),
        (H100, "bfloat16"), (T4, "float32"), (CPU, "float32"),
    ],
)  # fmt: skip
def test_the_compute_type_is_one_that_the_chip_has(chip: Chip, dtype: str, on: Any) -> None:
    on(chip)
    config = mini("debug")
    made = engine("mlx", config, working_weights(config.model, 1.0))
    assert chip.dtype == made.dtype == dtype and made.device == (f"{chip.name} (GPU)" if chip.gpu else "CPU")
    asked = engine("mlx", config, working_weights(config.model, 1.0), dtype="float16")
    assert asked.dtype == "float16", "what was asked for is taken"


def test_facts_are_read_as_mlx_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of Metal and of CUDA, from MLX's own description of device_info."""
    assert device.chip() == CPU
    said = {
        "device_name": "Apple M4", "architecture": "applegpu_g16g", "memory_size": 17.2 * GB,
        "max_recommended_working_set_size": 11.8 * GB, "max_buffer_length": 9 * GB, "resource_limit": 499000,
    }  # fmt: skip
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda device: said)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert device.chip() == M4
    said = {
        "device_name": H100.name, "architecture": "sm_90", "total_memory": 85 * GB, "free_memory": 80 * GB,
        "compute_capability_major": 9, "compute_capability_minor": 0,
    }  # fmt: skip
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert device.chip() == H100


# float32 that is float32.


@pytest.mark.parametrize("variable, expected", [(None, "0"), ("1", "1"), ("0", "0")])
def test_tf32_is_off_before_mlx_computes_unless_the_user_says_so(variable: str | None, expected: str) -> None:
    program = "import core.engine.loading, core, os\nimport backends.mlx.blas; print(os.environ['MLX_ENABLE_TF32'])"
    hidden = {key: value for key, value in os.environ.items() if key != "MLX_ENABLE_TF32"}
    given = hidden if variable is None else {**hidden, "MLX_ENABLE_TF32": variable}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=given, check=True)
    assert done.stdout.strip() == expected
    assert os.environ["MLX_ENABLE_TF32"] == "0", "the tests' own"


def test_a_device_that_multiplies_with_10_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products(True) == "in full (MLX_ENABLE_TF32=0)"

    matmul = mx.matmul

    def tf32(a: mx.array, b: mx.array) -> mx.array:
        """Return a product of which TF32 keeps 10 bits of every factor."""
        return matmul(*(mx.view(mx.view(x, mx.uint32) & 0xFFFFE000, mx.float32) for x in (a, b)))

    monkeypatch.setattr(mx, "matmul", tf32)
    assert products(True).startswith("to about 10 bits (MLX_ENABLE_TF32=0, but MLX had computed before")
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    assert products(True) == "to about 10 bits (MLX_ENABLE_TF32=1)"


def test_the_notes_say_how_float32_is_multiplied() -> None:
    config = mini("debug")
    notes = engine("mlx", config, working_weights(config.model, 1.0)).notes
    assert "float32 products: in full (MLX_ENABLE_TF32=0)" in notes


# float16.


def test_float16_is_for_mlx(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype float16: is for MLX"):
        load_engine("cuda", mini("debug"), options=EngineOptions(dtype="float16"))
    options = dataclasses.replace(Train.of(mini("debug")), backend="cuda", dtype="float16", out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="--dtype float16: is for MLX"):
        train_run(options, Context(Console(), "skc train"))
    assert not (tmp_path / "run").exists(), "refused before anything is made"


@pytest.mark.parametrize("name", ["debug", "skc_mac", "baseline"])
def test_float16_has_eight_times_the_digits_of_bfloat16(name: str) -> None:
    config, batch = mini(name), batches(mini(name), 1)[0]
    exact, narrow = (
        engine("mlx", config, working_weights(config.model, 1.0), dtype=dtype) for dtype in ("float32", "float16")
    )
    assert relative_rms(narrow.logits(batch.tokens), exact.logits(batch.tokens)) <= P2_FLOAT16
    assert np.abs(narrow.nll(*batch[:2]) - exact.nll(*batch[:2])).max() <= P2_FLOAT16
    (ours, grads), (theirs, wanted) = narrow.gradients(batch), exact.gradients(batch)
    assert abs(ours - theirs) <= P2_FLOAT16 * theirs, "the objective is not scaled"
    flat, exactly = (np.concatenate([of[key].ravel() for key in wanted]) for of in (grads, wanted))
    assert relative_rms(flat, exactly) <= P2_FLOAT16
    done, plan = [], schedule.plan(0, 0.5, config.train)
    for made in (narrow, exact):
        done.append(made.train_step(batch, plan).result())
    assert done[0].finite and done[0].grad_norm == pytest.approx(done[1].grad_norm, rel=P2_FLOAT16)


def small(weight: mx.array) -> tuple[mx.array, mx.array]:
    """Return an objective whose gradient, 1e-8, goes back through float16, and the objective again."""
    loss = 1e-8 * mx.sum(weight.astype(mx.float16).astype(mx.float32))
    return loss, loss


def test_small_gradients_live_because_they_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(weights: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        return small(weights["w"])

    weights = {"w": mx.ones((4,))}
    (objective, loss), grads = value_and_grad(losses, "float16")(weights)
    assert grads["w"].tolist() == pytest.approx(
        [1e-8] * 4, rel=0.01
    ) and objective.tolist() == loss.tolist() == pytest.approx(4e-8, rel=0.01)
    monkeypatch.setattr(device, "LOSS_SCALE", {})
    assert value_and_grad(losses, "float16")(weights)[1]["w"].tolist() == [0.0] * 4, "without, they vanish"


def test_a_step_that_overflows_float16_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini("debug")
    made = engine("mlx", config, working_weights(config.model, 1.0), dtype="float16")
    batch, plan = batches(config, 1)[0], schedule.plan(0, 0.5, config.train)
    before = made.params() | made.optimizer()
    monkeypatch.setattr(device, "LOSS_SCALE", {"float16": 2.0**30})
    result = made.train_step(batch, plan).result()
    assert not result.finite and np.isfinite(result.loss) and not np.isfinite(result.grad_norm)
    assert all(np.array_equal(value, before[key]) for key, value in (made.params() | made.optimizer()).items())
    monkeypatch.undo()
    again = engine("mlx", config, working_weights(config.model, 1.0), dtype="float16")
    assert again.train_step(batch, plan).result().finite


# Micro-batches.


@pytest.mark.parametrize(
    "name, chip, tokens, rows",
    [
        ("baseline", M4, 8192, 8), ("baseline", M1, 8192, 2), ("baseline", M3_MAX, 8192, 8),
        ("baseline", H100, 8192, 8), ("baseline", M3_MAX, None, 64), ("baseline", M1, None, 64),
        ("tiny", M1, 8192, 16), ("tiny", CPU, 8192, 16), ("baseline", CPU, 8192, 64),
    ],
)  # fmt: skip
def test_a_micro_batch_has_8192_tokens_on_a_gpu_unless_more_was_asked_for(
    name: str, chip: Chip, tokens: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.engine.fitting.os.sysconf", lambda name: 2**20 if name == "SC_PAGE_SIZE" else 2**20)
    config = presets.get(name).config
    most, memory = micro_batch(chip, tokens, Alone())
    assert fitting(config, config.train.seq, chip.dtype, memory, True, most) == rows


@pytest.mark.parametrize(
    "chip, rows, message",
    [
        (M4, 8, None), (M3_MAX, 64, r"64 rows of 1,024 tokens in a micro-batch take 54\.1 GB in bfloat16 by estimate, "
         r"more than 35\.7 GB, which is 0\.7 of the 51 GB that Apple M3 Max may fill: lower --train\.micro-batch$"),
        (H100, 64, None), (CPU, 64, None), (M1, 2, None), (M1, 4, "take 6.63 GB in float32"),
        (M1._replace(working_set=1e9), 1, "take 2.07 GB .* lower --train.seq, or the model$"),
    ],
)  # fmt: skip
def test_what_would_swap_is_refused_with_figures(chip: Chip, rows: int, message: str | None) -> None:
    config = presets.get("baseline").config
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_memory(chip, config, rows, config.train.seq, chip.dtype, True)


def test_the_engine_keeps_to_that(on: Any) -> None:
    config, batch = mini("debug"), batches(mini("debug"), 1)[0]
    weights, plan = working_weights(config.model, 1.0), schedule.plan(0, 0.5, config.train)
    whole: Any = load_engine("mlx", config, weights)
    whole.train_step(batch, plan).result()
    on(M1)
    made: Any = load_engine("mlx", config, weights, EngineOptions(micro_tokens=80))
    assert any(note.startswith("micro-batches: 2 of 4 rows, to have at most 80 tokens, and to") for note in made.notes)
    made.train_step(batch, plan).result()
    for name, value in whole.params().items():
        assert relative_rms(made.params()[name], value) <= P3_FLOAT32, name
    on(M1._replace(working_set=1e6))
    made = load_engine("mlx", config, weights, EngineOptions(micro_tokens=None))
    made.nll(*batch[:2])  # who only scores keeps nothing
    with pytest.raises(ConfigError, match="4 rows of 37 tokens in a micro-batch take 0.00"):
        made.train_step(batch, plan)


@pytest.mark.parametrize(
    "given, changes, asked",
    [
        ("", {}, False), ("--train.micro-batch 64", {}, True), ("--train.micro_batch=64", {}, True),
        ("--train.micro-batch none", {}, True), ("", {"micro_batch": 16}, True),
    ],
)  # fmt: skip
def test_rows_are_asked_for_on_the_command_line_or_by_an_ablation(
    given: str, changes: dict[str, Any], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that the preset has anyway."""
    asking = _parse("train", ["baseline", *given.split(), "--dry-run"])
    asking = dataclasses.replace(asking, train=dataclasses.replace(asking.train, **changes))
    options = []

    def stopped(backend: str, config: RunConfig, weights: Any, choices: EngineOptions, **more: Any) -> Any:
        options.append(choices)
        raise KeyboardInterrupt

    monkeypatch.setattr("core.verbs.train.start_weights", lambda config, split: {})
    with pytest.raises(KeyboardInterrupt):
        train_run(asking, Context(Console(), "skc train", stopped))
    assert options[0].micro_tokens == (None if asked else 8192)


# Memory between phases.


def test_the_cache_is_cleared_where_training_and_scoring_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch, calls = mini("debug"), batches(mini("debug"), 1)[0], []
    made = engine("mlx", config, working_weights(config.model, 1.0))
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(doing))
    plan = schedule.plan(0, 0.5, config.train)
    for doing in ("step", "step", "score", "score", "step", "step", "write", "score", "step"):
        if doing == "step":
            made.train_step(batch, plan).result()
        elif doing == "score":
            made.nll(*batch[:2])
        else:
            made.chunk(made.start(1), batch.tokens[:1])
    assert calls == ["score", "step", "write", "step"]


@pytest.mark.parametrize(
    "chip, active, wired",
    [(M4, 8.5 * GB, []), (M4, 8.7 * GB, [11_800_000_000]), (H100, 80 * GB, []), (CPU, 80 * GB, [])],
)
def test_memory_is_wired_where_it_pays_and_given_back(
    chip: Chip, active: float, wired: list[int], on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(mx, "get_active_memory", lambda: active)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(limit) or 7)
    config, batch = mini("debug"), batches(mini("debug"), 1)[0]
    on(chip)
    made: Any = engine("mlx", config, working_weights(config.model, 1.0), dtype="float32")
    for step in range(2):
        made.train_step(batch, schedule.plan(step, 0.5, config.train)).result()
    assert calls == wired, "once"
    del made
    gc.collect()
    assert calls == [*wired, *(7 for _ in wired)], "the limit before is back"


def test_a_mac_without_a_wired_limit_trains_all_the_same(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(limit: int) -> int:
        raise RuntimeError("[metal::set_wired_limit] larger than the system's")

    monkeypatch.setattr(mx, "get_active_memory", lambda: 9 * GB)
    monkeypatch.setattr(mx, "set_wired_limit", refused)
    assert keep_resident(object, M4)


# A device of its own.


class Here:
    """Stands for mx.stream: says what is entered, and whether something is."""

    inside = 0

    def __init__(self, where: Any) -> None:
        assert where == mx.cpu

    def __enter__(self) -> None:
        Here.inside += 1

    def __exit__(self, *_: object) -> None:
        Here.inside -= 1


def test_a_float64_engine_computes_on_the_cpu_and_leaves_the_process_as_it_is(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every op of the model runs inside of the CPU's stream; a bfloat16 engine beside it never does."""
    config, batch = mini("skc_mac"), batches(mini("skc_mac"), 1)[0]
    weights, plan, before = working_weights(config.model, 1.0), schedule.plan(0, 0.5, config.train), mx.default_device()
    plain = load_engine("mlx", config, weights, EngineOptions(dtype="float64", compile=False))
    on(M4)
    monkeypatch.setattr(mx, "stream", Here)
    seen: list[int] = []
    forward = Model.__call__
    monkeypatch.setattr(Model, "__call__", lambda *a, **k: seen.append(Here.inside) or forward(*a, **k))
    wide: Any = load_engine("mlx", config, weights, EngineOptions(dtype="float64", compile=False))
    assert isinstance(wide, OnTheCPU) and wide.dtype == "float64" and wide.quantise is False
    narrow = load_engine("mlx", config, weights, EngineOptions(compile=False))
    assert narrow.dtype == "bfloat16" and narrow.device == "Apple M4 (GPU)"
    losses = [made.train_step(batch, plan).result().loss for made in (plain, wide)]
    assert losses[0] == losses[1] and Here.inside == 0
    state = wide.start(len(batch.tokens))
    tape = wide.chunk(state, batch.tokens)
    assert relative_rms(tape.logits(), wide.logits(batch.tokens)) <= P2_FLOAT64 and tape.nll(batch.targets).shape
    assert wide.commit(tape, 5).position.tolist() == [5] * len(batch.tokens)
    assert np.array_equal(wide.nll_later(*batch[:2], False)(), wide.nll(*batch[:2]))
    assert seen.count(0) == 1, "the engine of before"
    seen.clear()
    narrow.nll(*batch[:2])
    assert seen == [0] and mx.default_device() == before


def test_no_method_of_an_engine_or_tape_is_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "stream", Here)
    names = [name for kind in (Measured, Tape) for name, _ in inspect.getmembers(kind, inspect.isfunction)]
    names = [name for name in names if not name.startswith("_")]
    assert {"train_step", "gradients", "commit", "update_seconds"} <= set(names)

    class Watched:
        """Has every method; each returns whether it ran inside."""

        nll = None

    def method(self: Watched, *_: Any) -> bool:
        return Here.inside == 1

    for name in names:
        setattr(Watched, name, method)
    made = OnTheCPU(Watched)
    assert all(getattr(made, name)() for name in names) and Here.inside == 0
    monkeypatch.setattr(Watched, "chunk", lambda self: Watched())
    assert made.chunk().nll() and made.chunk().logits(), "a tape computes, too"
