"""Soft rounding (train.quantise_soft): its curve, its slope, its place in a step and in a run. Budget: 20 s."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from core.check.tolerances import P1_DIFFERENCE, P1_EXACT, P2_FLOAT64, P3_FLOAT64, relative_rms
from core.config import ConfigError, RunConfig, TrainConfig, changed
from core.model.params import param_table
from core.model.storage import LARGEST, decode, gridded, storage_class
from core.training import schedule
from core.training.loop import warm_up
from shared_tests.support.harness import (
    BACKENDS,
    batches,
    draw,
    engine,
    mini,
    module,
    to_device,
    to_numpy,
    working_weights,
)

STORAGES = ("int8/row", "int6/row", "int4/64")


def of(**train: Any) -> RunConfig:
    """Return a run of a small model whose matrices round softly from its second half on."""
    base = mini("debug")
    settings: dict[str, Any] = {
        "steps": 8, "warmup": 0.0, "warmdown": 1.0, "floor": 0.0, "quantise": "late", "quantise_below": 0.5,
        "quantise_soft": (1.0, 16.0), "z_loss": 0.0,
    }  # fmt: skip
    model = changed(base.model, {"layers": 1, "matrix_storage": "int4/64", "embedding.storage": "int6/row"})
    return dataclasses.replace(base, model=model, train=dataclasses.replace(base.train, **(settings | train)))


def softened(backend: str, weight: np.ndarray, storage: str, softness: float, dtype: str = "float64") -> Any:
    """Return (value, slope) of a weight (R, C)."""
    given = to_device(backend, weight, dtype), storage, to_device(backend, np.array(softness), dtype)
    return tuple(to_numpy(side) for side in module(backend, "storage").softened(*given))


def expected(weight: np.ndarray, storage: str, softness: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (value, slope), one weight after the other."""
    rows, columns = weight.shape
    size = columns if storage.endswith("/row") else int(storage.partition("/")[2])
    value, slope = np.zeros_like(weight), np.zeros_like(weight)
    most = LARGEST[storage_class(storage)]  # type: ignore[arg-type]
    for r in range(rows):
        for first in range(0, columns, size):
            group = slice(first, min(first + size, columns))
            scale = max(float(np.float16(np.float32(np.abs(weight[r, group]).max() * (1 / most)))), 2.0**-14)
            for c in range(group.start, group.stop):
                u = weight[r, c] / scale
                inside, u = abs(u) <= most, min(max(u, -most), most)
                f, end = u - np.floor(u), np.tanh(softness / 2)
                value[r, c] = scale * (np.floor(u) + 0.5 + np.tanh(softness * (f - 0.5)) / (2 * end))
                slope[r, c] = inside * softness * (1 - np.tanh(softness * (f - 0.5)) ** 2) / (2 * end)
    return value, slope


@pytest.mark.pair
@pytest.mark.parametrize("softness", [0.01, 1.0, 7.0, 50.0])
@pytest.mark.parametrize("storage", STORAGES)
def test_both_are_what_the_formula_says(storage: str, softness: float) -> None:
    weight = draw(f"soft/{storage}", 5, 150) * np.array([1.0, 0.02, 1e-7, 30.0, 0.0])[:, None]
    sides = [softened(backend, weight, storage, softness) for backend in BACKENDS]
    for ours, theirs, reference in zip(*sides, expected(weight, storage, softness), strict=True):
        assert relative_rms(ours, reference) <= P1_EXACT and relative_rms(theirs, reference) <= P1_EXACT


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_curve_keeps_grid_and_middle_and_has_both_limits(backend: str, dtype: str) -> None:
    """r(0) = 0, r(1) = 1, r(1/2) = 1/2; next to no softness is the weight itself, much of it is the stored form."""
    codes = np.arange(-14, 15)[None] / 2.0  # of int4, whose scale is 1: every code, and half-way between
    for softness in (0.01, 1.0, 16.0, 1000.0):
        value, _ = softened(backend, codes, "int4/row", softness, dtype)
        assert np.abs(value - codes).max() < (1e-12 if dtype == "float64" else 1e-4)
    weight = draw("limits", 4, 90) * 0.05
    stored = to_numpy(module(backend, "storage").stored(to_device(backend, weight, dtype), "int4/row"))
    scale = np.abs(weight).max() / 7
    near, far = (softened(backend, weight, "int4/row", softness, dtype)[0] for softness in (0.01, 1000.0))
    inside = np.abs(weight) < np.abs(stored).max(axis=1, keepdims=True)
    assert np.abs(near - weight)[inside].max() < 1e-4 * scale
    share = np.abs(weight / (np.abs(stored).max(axis=1, keepdims=True) / 7) % 1 - 0.5)
    assert np.abs(far - stored)[share > 0.01].max() < 1e-4 * scale and (share > 0.01).mean() > 0.9
    values = [softened(backend, weight, "int4/row", a, dtype)[0] for a in (0.01, 2.0, 8.0, 32.0, 1000.0)]
    gaps = [np.abs(value - stored).mean() for value in values]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 10 * gaps[-1], "ever nearer"


@pytest.mark.parametrize("backend", BACKENDS)
def test_its_slope_is_its_derivative(backend: str) -> None:
    """By differences, with every group's largest weight left alone: it is the scale."""
    weight = draw("derivative", 3, 150) * 0.1
    weight[:, ::64] = 0.5
    _, slope = softened(backend, weight, "int6/64", 5.0)
    way = draw("way", 3, 150) * (np.arange(150) % 64 > 0)
    up, down = (softened(backend, weight + sign * 1e-8 * way, "int6/64", 5.0)[0] for sign in (1, -1))
    assert np.sum(up - down) / 2e-8 == pytest.approx(np.sum(slope * way), rel=P1_DIFFERENCE * 100)
    assert relative_rms((up - down) / 2e-8, slope * way) < 1e-6


@pytest.mark.pair
def test_gradients_are_those_of_the_objective_and_agree() -> None:
    """A direction of change that leaves every scale as it is; the embedding (int6) takes part as the matrices do."""
    config = of()
    weights = {n: v.astype(np.float64) for n, v in working_weights(config.model, 2.0).items()}
    table = param_table(config.model)
    soft = [name for name, row in table.items() if gridded(row.storage)]
    for name in soft:  # far outside, in the middle of nothing: the largest of its group
        weights[name][:, ::64] = 3.0 * np.abs(weights[name]).max()
    batch, found = batches(config, 1)[0], {}
    for backend in BACKENDS:
        made = engine(backend, config, weights, dtype="float64")
        found[backend] = made.gradients(batch, softness=4.0)
        for name in soft[:3]:
            columns = weights[name].shape[1]
            way, sides = draw(f"way/{name}", *weights[name].shape) * (np.arange(columns) % 64 > 0), []
            for sign in (1, -1):
                made.load_params(weights | {name: weights[name] + sign * 1e-6 * way})
                sides.append(made.gradients(batch, softness=4.0)[0])
            slope = np.sum(found[backend][1][name] * way)
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-9), (backend, name)
    (loss, ours), (other, theirs) = found.values()
    assert loss == pytest.approx(other, rel=1e-12)
    assert all(relative_rms(ours[name], theirs[name]) <= P2_FLOAT64 for name in table)
    assert loss != made.gradients(batch)[0]


@pytest.mark.pair
def test_a_step_takes_the_plans_softness_and_the_true_gradient() -> None:
    """The norm of a step is that of `gradients` at the plan's softness; both backends end in the same weights."""
    config, ends = of(micro_batch=1, clip=None), []
    data = batches(config, 8)
    for backend in BACKENDS:
        made, norms = engine(backend, config, dtype="float64"), []
        for step, batch in enumerate(data):
            plan = schedule.plan(step, schedule.progress_by_steps(step, config.train), config.train)
            softness = plan.softness if plan.quantise else None
            before = made.gradients(batch, softness)[1]
            norms.append(made.train_step(batch, plan).result().grad_norm)
            size = np.sqrt(sum(float(np.sum(g**2)) for g in before.values()))
            assert norms[-1] == pytest.approx(size, rel=1e-9), step
            assert made.quantise == plan.quantise
        assert [plan_of(config, s).quantise for s in range(8)] == [False] * 4 + [True] * 4
        stored, used = made.quantised(), made.weights()
        for name, row in param_table(config.model).items():
            assert np.array_equal(used[name], decode(stored[name], row.storage)), "scored is rounded hard"
        ends.append({**made.params(), "norms": np.array(norms)})
    assert all(relative_rms(ends[1][name], value) <= 100 * P3_FLOAT64 for name, value in ends[0].items())


def plan_of(config: RunConfig, step: int) -> Any:
    """Return the plan of a step."""
    return schedule.plan(step, schedule.progress_by_steps(step, config.train), config.train)


def test_sharpness_rises_at_equal_ratios_over_the_span_of_rounding() -> None:
    train = of().train  # the scale falls from 1 to 0: below 1/2 from half of the run on
    assert schedule.quantise_from(train) == pytest.approx(0.5, abs=1e-12)
    assert [schedule.softness(p, train) for p in (0.5, 0.625, 0.75, 1.0, 1.1)] == pytest.approx([1, 2, 4, 16, 16])
    always = dataclasses.replace(train, quantise="always")
    assert [schedule.softness(p, always) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1, 2, 4, 16])
    assert plan_of(of(), 7).softness == pytest.approx(16) and plan_of(of(quantise_soft=None), 7).softness == 0
    assert "softness" in schedule.StepPlan.__annotations__ and "softness" in module("cuda", "update").NUMBERS


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, RunConfig], Any]]:
    """Return engines that compile: MLX with its compiler, torch's graphs run as they are."""
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs, **options: graph.forward)
    torch._dynamo.reset()
    yield lambda backend, config: engine(backend, config, dtype="float32", compile=True)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", ["cuda", pytest.param("mlx", marks=pytest.mark.long)])  # MLX calls a C++ compiler
def test_the_compiled_step_rounds_softly_and_is_compiled_once(
    backend: str, compiling: Callable[[str, RunConfig], Any]
) -> None:
    """Another sharpness is another loss, hard rounding and none are others again, and no step compiles after warm-up.

    Snapshots too, which a run may take in its last steps.
    """
    config = of(average_from=0.0, snapshot_every=2, snapshot_below=0.6, log_every=1)
    made, batch, start = compiling(backend, config), batches(config, 1)[0], working_weights(config.model, 2.0)
    warm_up(made, config)
    traces, losses = made.stats()["traces"], []
    always = dataclasses.replace(config.train, quantise="always")
    for softness in (1.0, 8.0, 500.0):
        plan = dataclasses.replace(plan_of(config, 7), softness=softness, snapshot=softness < 500)
        made.load_params(start)
        losses.append(made.train_step(batch, plan).result().loss)
    made.load_params(start)
    losses.append(made.train_step(batch, plan_of(config, 0)).result().loss)
    assert made.stats()["traces"] == traces > 0
    eager = engine(backend, dataclasses.replace(config, train=always), start, dtype="float32")
    losses.append(eager.gradients(batch)[0])
    assert len(set(losses)) == 5, losses
    assert losses[0] == pytest.approx(eager.gradients(batch, softness=1.0)[0], rel=1e-5)
    assert abs(losses[2] - losses[4]) < 0.2 * abs(losses[0] - losses[4]), "the sharpest is nearest to hard rounding"


@pytest.mark.parametrize(
    "given, words",
    [
        ({"quantise_soft": (1.0, 16.0)}, "train.quantise_soft rounds nothing with train.quantise=never"),
        (
            {"quantise_soft": (16.0, 1.0), "quantise": "always"},
            r"train.quantise_soft=\(16.0, 1.0\): expected two rising",
        ),
        ({"quantise_soft": (0.0, 1.0), "quantise": "always"}, "expected two rising numbers from 0.01 to 1000"),
        ({"quantise_soft": (1.0, 1e9), "quantise": "always"}, "expected two rising numbers from 0.01 to 1000"),
        ({"quantise_soft": (1.0,), "quantise": "always"}, "expected two rising numbers from 0.01 to 1000"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**given)


@pytest.mark.parametrize(
    "storages, words",
    [
        (("ternary/64", "int8/row"), "the model has weights in ternary/64: leave it out, or take int4 to int8"),
        (("int8/row", "fp8/row"), "the model has weights in fp8/row"),
        (("float16", "float16"), "the model has no such weights"),
    ],
)
def test_storages_without_a_grid_to_the_largest_weight_are_refused(storages: tuple[str, str], words: str) -> None:
    config = of()
    model = changed(config.model, dict(zip(("matrix_storage", "embedding.storage"), storages, strict=True)))
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(config, model=model)
