"""Rate-aware training (train.rate): code lengths and their slopes, their place in a step, their use. Budget: 20 s."""

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from core.check.tolerances import P1_EXACT, P3_FLOAT64, relative_rms
from core.config import ConfigError, RunConfig, TrainConfig, changed
from core.export import codecs
from core.export.coder import FRACTION, SymbolRun, fitted
from core.export.symbols import symbols_of
from core.model.params import param_table
from core.model.storage import LARGEST, decode, gridded, group_size, scales_of, storage_class
from core.training import schedule
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

RULES = (("int8/row", None), ("int6/row", 13.0), ("int5/64", None), ("int4/64", 20.0), ("int7/128", 30.0))


def of(**train: Any) -> RunConfig:
    """Return a run of a small model with three rules of storage whose codes count from its second half on."""
    base = mini("debug")
    settings: dict[str, Any] = {
        "steps": 8, "rate": 0.3, "rate_from": 0.5, "clip": None, "matrix_rule": "muon", "z_loss": 0.0,
    }  # fmt: skip
    model = {
        "layers": 1, "matrix_storage": "int4/64", "embedding.storage": "int6/row", "deviations.attention": 20.0,
    }  # fmt: skip
    train = dataclasses.asdict(base.train) | settings | train
    return dataclasses.replace(base, model=changed(base.model, model), train=TrainConfig(**train))


def plan_of(config: RunConfig, step: int) -> Any:
    """Return the plan of a step."""
    return schedule.plan(step, schedule.progress_by_steps(step, config.train), config.train)


def priced(backend: str, stack: np.ndarray, rule: Any, dtype: str = "float64") -> list[np.ndarray]:
    """Return (bits, slope) of a stack (N, R, C)."""
    return [to_numpy(side) for side in module(backend, "storage").priced(to_device(backend, stack, dtype), *rule)]


def groups(columns: int, storage: Any) -> list[slice]:
    """Return the columns of each group of a row."""
    size = group_size(storage, columns)
    return [slice(first, min(first + size, columns)) for first in range(0, columns, size)]


def expected(weight: np.ndarray, rule: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return (bits, slope) of a matrix, one weight after the other; slopes at scales that stand still."""
    storage, most = rule[0], LARGEST[storage_class(rule[0])]
    size, scales = group_size(storage, weight.shape[1]), scales_of(weight, *rule).astype(np.float64)
    places = {at: min(max(value / scales[at[0], at[1] // size], -most), most) for at, value in np.ndenumerate(weight)}
    counts = Counter(round(u) for u in places.values())  # to even, as codes are

    def length(code: int) -> float:
        frequency = 1 + (2**14 - 2 * most - 1) * counts[code] // weight.size
        return 14 - math.floor(math.log2(frequency) * 4096) / 4096

    bits, slope = np.zeros_like(weight), np.zeros_like(weight)
    for at, u in places.items():
        low, high = length(math.floor(u)), length(math.ceil(u))
        bits[at] = low + (u - math.floor(u)) * (high - low)
        slope[at] = (high - low) / scales[at[0], at[1] // size]
    return bits, slope


def following(weight: np.ndarray, slope: np.ndarray, rule: Any) -> np.ndarray:
    """Return slopes at scales that follow the standard deviations where they are made of them."""
    slope, most = slope.copy(), LARGEST[storage_class(rule[0])]
    for row, sloping in zip(weight, slope, strict=True):
        for part in groups(weight.shape[1], rule[0]):
            w, deviation = row[part], row[part].std()
            if (
                rule[1] is not None
                and 4 * rule[1] * deviation >= np.abs(w).max()
                and rule[1] * deviation / most > 2.0**-14
            ):
                # d log(scale) / dw = (w - mean) / (n variance); a scale that grows takes every u along
                sloping[part] -= (sloping[part] @ w) * (w - w.mean()) / (w.size * deviation**2)
    return slope


def hard(name: str) -> np.ndarray:
    """Return two matrices whose last groups are not full, with rows of all sizes, of zeros and of equal weights."""
    stack = draw(name, 2, 6, 150) * np.array([1.0, 0.02, 1e-7, 30.0, 0.0, 1.0])[:, None]
    stack[0] = np.sign(stack[0]) * np.abs(stack[0]) ** 3  # other codes are frequent than in the second
    stack[:, 5] = 0.25
    return stack


@pytest.mark.pair
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_both_are_what_the_formula_says(rule: Any) -> None:
    stack = hard(f"rate/{rule}")
    sides, references = [priced(backend, stack, rule) for backend in BACKENDS], []
    for weight in stack:
        bits, slope = expected(weight, rule)
        references.append((bits, following(weight, slope, rule)))
    for ours, theirs, both in zip(*sides, zip(*references, strict=True), strict=True):
        assert relative_rms(ours, theirs) <= P1_EXACT
        for row, reference in zip(ours.reshape(12, -1), np.stack(both).reshape(12, -1), strict=True):
            assert relative_rms(row, reference) <= P1_EXACT or not reference.any() and not row.any()
    assert 0 < (sides[0][1] == 0).mean() < 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_slope_is_the_derivative(rule: Any, backend: str) -> None:
    """By differences too small for a float16 scale to move, which moves as its rule says all the same."""
    weight, way = draw(f"slope/{rule}", 5, 150) * 0.0987, draw("rate/way", 5, 150)
    slope, sums = priced(backend, weight[None], rule)[1][0], []
    for sign in (1, -1):
        near = weight + sign * 1e-9 * way
        for part in groups(150, rule[0]) if rule[1] is not None else ():  # as far away in scales as it will be
            near[:, part] *= weight[:, part].std(axis=1, keepdims=True) / near[:, part].std(axis=1, keepdims=True)
        sums.append(priced(backend, near[None], rule)[0][0].sum(axis=1))
    assert np.allclose((sums[0] - sums[1]) / 2e-9, (slope * way).sum(axis=1), rtol=1e-4, atol=1e-3)
    if rule[1] is not None:
        assert np.abs((slope * weight).sum(axis=1)).max() < 1e-9 * np.abs(slope * weight).sum(axis=1).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_on_its_code_costs_what_the_coder_takes_for_it(backend: str) -> None:
    """The lengths are those of the one table that the coder fits to the codes, to the digits of its levels."""
    storage, rule = module(backend, "storage"), ("int6/64", None)
    kept = storage.to_host(to_device(backend, draw("rate/coder", 128, 256), "float64"), *rule)
    on_codes = decode(kept, "int6/64").astype(np.float64)  # by the largest weight they have the same scales
    symbols = symbols_of("int6", kept.codes).ravel()
    coded = SymbolRun(symbols, fitted(np.bincount(symbols))[0]).bits / (1 << FRACTION)
    assert np.array_equal(storage.to_host(to_device(backend, on_codes, "float64"), *rule).codes, kept.codes)
    assert priced(backend, on_codes[None], rule)[0].sum() == pytest.approx(coded, rel=0.002)


@pytest.mark.pair
@pytest.mark.parametrize("more", [{}, {"quantise": "always", "quantise_soft": (1.0, 4.0)}], ids=["float", "soft"])
def test_a_step_has_the_gradient_once_from_its_switch_on(more: dict[str, Any]) -> None:
    """Whatever the micro-batches; both backends end in the same weights; the reported loss is the one without it.

    A step's norm is that of the loss's gradient with rate times the mean slope, before the switch that of the loss's.
    """
    config, ends = of(micro_batch=1, **more), []
    data, table = batches(config, 8), param_table(config.model)
    coded = sum(row.size for row in table.values() if gridded(row.storage))
    for backend in BACKENDS:
        made = engine(backend, config, working_weights(config.model, 0.3), dtype="float64")
        for step in (0, 1, 6, 7):
            now = plan_of(config, step)
            assert now.rate == (0.3 if step > 3 else 0.0)
            loss, grads = made.gradients(data[step], now.softness or None)
            for name, value in made.params().items():
                if gridded(table[name].storage):
                    rule = table[name].storage, table[name].deviation
                    grads[name] = grads[name] + now.rate / coded * priced("cuda", value[None], rule)[1][0]
            size = np.sqrt(sum(float(np.sum(g**2)) for g in grads.values()))
            found = made.train_step(data[step], now).result()
            assert found.grad_norm == pytest.approx(size, rel=1e-9), (backend, step)
            assert found.loss == pytest.approx(loss, rel=1e-9)
        ends.append(made.params())
    assert all(relative_rms(ends[1][name], value) <= 100 * P3_FLOAT64 for name, value in ends[0].items())


def two_steps(backend: str, config: RunConfig, compiled: bool) -> tuple[Any, Any]:
    """Return the weights after a step before the switch, and after another one behind it; nothing compiles for it."""
    made, data = (
        engine(backend, config, working_weights(config.model, 0.3), compile=compiled, dtype="float64"),
        batches(config, 2),
    )
    made.train_step(data[0], plan_of(config, 0)).result()
    before, traces = made.params(), made.stats()["traces"]
    made.train_step(data[1], plan_of(config, 7)).result()
    assert made.stats()["traces"] == traces and (traces > 0) == compiled
    return before, made.params()


@pytest.mark.parametrize("backend", BACKENDS)
def test_before_the_switch_no_bit_is_another(backend: str) -> None:
    before, end = two_steps(backend, of(), False)
    plain, plain_end = two_steps(backend, of(rate=0.0, rate_from=0.0), False)
    assert all(value.tobytes() == plain[name].tobytes() for name, value in before.items())
    moved = {name for name, value in end.items() if not np.array_equal(value, plain_end[name])}
    assert {name for name, row in param_table(of().model).items() if gridded(row.storage)} <= moved


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_switch_compiles_nothing(backend: str) -> None:
    """By the compilers themselves, inductor too; what they make gives what eager code does, where no code flips."""
    (_, compiled), (_, eager) = (two_steps(backend, of(), wanted) for wanted in (True, False))
    assert all(relative_rms(compiled[name], value) < 1e-9 for name, value in eager.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_no_numbers_change_nothing(backend: str) -> None:
    config = of(rate_from=0.0)
    weights = dict(working_weights(config.model, 0.3))
    name = next(name for name, row in param_table(config.model).items() if row.storage == "int4/64")
    weights[name] = np.full_like(weights[name], np.nan)
    made = engine(backend, config, weights, dtype="float32")
    assert not made.train_step(batches(config, 1)[0], plan_of(config, 0)).result().finite
    assert all(np.array_equal(value, weights[name], equal_nan=True) for name, value in made.params().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deviation", [None, 20.0])
def test_an_artifact_gets_smaller(deviation: float | None, backend: str) -> None:
    """What the coder takes for the matrices after fifteen steps, against the same run without a rate; it learns."""
    bits, losses, made = [], [], {"matrix_storage": "int6/row"}
    made |= {f"deviations.{role}": deviation for role in ("mlp", "attention", "table")}
    for rate in (0.0, 0.02):
        config = of(rate=rate, rate_from=0.0, steps=15, matrix_rule="adamw", warmup=0.0, warmdown=0.0)
        config = dataclasses.replace(config, model=changed(config.model, made))
        trained, batch = (
            engine(backend, config, working_weights(config.model, 0.3), dtype="float32"),
            batches(config, 1),
        )
        results = [trained.train_step(batch[0], plan_of(config, step)) for step in range(15)]
        losses.append(results[-1].result().loss)
        sizes = codecs.tensor_sizes(trained.quantised(), table := param_table(config.model))
        coded = [name for name, row in table.items() if gridded(row.storage)]
        bits.append(sum(sizes[name].bits for name in coded) / sum(table[name].size for name in coded))
    assert bits[1] < bits[0] - 0.3 and losses[1] < losses[0] + 0.15, (bits, losses)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"rate": -0.1}, "train.rate=-0.1: expected a number from 0 up"),
        ({"rate_from": 0.5}, "train.rate_from=0.5: expected a share below 1, and a train.rate"),
        ({"rate": 0.1, "rate_from": 1.0}, "train.rate_from=1.0: expected a share below 1"),
        ({"rate": 0.1, "rate_from": 1.5}, "train.rate_from=1.5: expected a share between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**given)


def test_a_rate_without_codes_on_a_grid_is_refused() -> None:
    config = of()
    for storage in ("float16", "ternary/64", "fp8/row"):
        model = changed(config.model, {"deviations.attention": None, "embedding.storage": "float16"})
        with pytest.raises(ConfigError, match="train.rate=0.3: the model has no weights in int4 to int8; leave it out"):
            dataclasses.replace(config, model=changed(model, {"matrix_storage": storage}))
