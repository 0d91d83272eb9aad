"""What the forward pass uses is what the artifact keeps: quantisers against the oracle and each other. Budget: 90 s.

One case per backend compiles the quantisers.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core.check.tolerances import P2_FLOAT32, P2_FLOAT64, relative_rms
from core.config import ModelConfig, RunConfig, changed
from core.engine.optimizer_state import exported
from core.model.params import param_table
from core.model.storage import (
    LARGEST,
    SCALE_FLOOR,
    STORAGES,
    Storage,
    by_ratios,
    decode,
    group_counts,
    group_size,
    storage_class,
)
from core.training import schedule
from shared_tests import oracle
from shared_tests.reference import storage as reference
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
from shared_tests.support.twins import assert_same, by_group, outcome

pytestmark = pytest.mark.pair
QUANTISED: list[Storage] = [storage for storage in STORAGES if storage != "float16"]
WIDTHS = (1, 5, 64, 128, 189, 320)


def some_weight(columns: int, dtype: str = "float32") -> np.ndarray:
    """Return rows of ordinary weights, and rows that are zero, tiny, below the smallest scale, large, or spiky."""
    weight = draw(f"storage/{columns}", 48, columns) * 0.02
    weight[0] = 0.0
    weight[1] = 1e-9
    weight[2] *= 1e-3
    weight[3] *= 1e4
    weight[4, 0] = 3.0
    weight[5] = -0.0
    return weight.astype(dtype)


def host(backend: str, weight: np.ndarray, storage: Storage, dtype: str) -> Any:
    return module(backend, "storage").to_host(to_device(backend, weight, dtype), storage)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("storage", STORAGES)
def test_both_backends_store_the_same_bits_and_use_what_a_reader_decodes(storage: Storage, dtype: str) -> None:
    for columns in WIDTHS:
        weight = some_weight(columns, dtype)
        ours, theirs = (host(b, weight, storage, dtype) for b in BACKENDS)
        assert ours.codes.dtype == theirs.codes.dtype and ours.codes.tobytes() == theirs.codes.tobytes()
        if storage != "float16":
            assert ours.scales.dtype == np.float16 and ours.scales.tobytes() == theirs.scales.tobytes()
        decoded = decode(ours, storage)
        for backend in BACKENDS:
            used = to_numpy(module(backend, "storage").stored(to_device(backend, weight, dtype), storage))
            assert used.dtype == dtype and used.astype(np.float32).tobytes() == decoded.tobytes()
            assert np.array_equal(used, decoded), "float32 holds it exactly"
        assert np.array_equal(decoded, reference.decode(ours, storage))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("storage", STORAGES)
def test_codes_are_the_oracles_except_counted_ties(storage: Storage, dtype: str) -> None:
    """A float32 mean is a rounding from the exact one: where that rounding crosses a tie of float16, it is counted."""
    ties = total = 0
    for columns in WIDTHS:
        weight = some_weight(columns, dtype)
        expected = reference.quantise(weight, storage)
        got = host("cuda", weight, storage, dtype)
        if storage == "float16":
            assert got.codes.tobytes() == expected.codes.tobytes()
            continue
        assert expected.scales is not None
        same = got.scales == expected.scales
        size = group_size(storage, columns)
        if not same.all():
            starts = np.arange(0, columns, size)
            sums = np.add.reduceat(np.abs(weight.astype(np.float64)), starts, axis=1)
            exact = (sums / np.array(group_counts(columns, size)))[~same]
            middle = (got.scales.astype(np.float64) + expected.scales.astype(np.float64))[~same] / 2
            middle = 2 ** ((np.floor(32 * np.log2(exact)) + 0.5) / 32) if by_ratios(storage) else middle
            assert np.allclose(exact, middle, rtol=1e-6), "no tie, but another scale"
        wide = np.repeat(same, size, 1)[:, :columns]
        assert np.array_equal(got.codes[wide], expected.codes[wide])
        ties, total = ties + int((~same).sum()), total + same.size
    assert ties <= (0 if dtype == "float64" or not storage.startswith("ternary") else 1e-2 * total)


def test_grouping_counts_real_values_only() -> None:
    assert group_counts(189, 64) == [64, 64, 61] and group_counts(128, 128) == [128]
    weight = np.full((1, 65), 0.5, np.float32)
    for backend in BACKENDS:
        got = host(backend, weight, "ternary/64", "float32")
        assert got.scales.tolist() == [[0.5, 0.5]] and (got.codes == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_even_and_nothing_is_minus_zero(backend: str) -> None:
    weight = np.ones((1, 64), np.float32)  # mean 1 within float16: scale 1
    weight[0, :4] = [0.5, -0.5, np.nextafter(np.float32(0.5), 1), -np.nextafter(np.float32(0.5), 1)]
    weight[0, 4:8] = 1.5  # keeps the mean at 1
    got = host(backend, weight, "ternary/64", "float32")
    assert got.scales[0, 0] == 1.0 and got.codes[0, :5].tolist() == [0, 0, 1, -1, 1]
    weight = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -0.2]], np.float32)  # scale 1
    got = host(backend, weight, "int8/row", "float32")
    assert got.scales[0, 0] == 1.0 and got.codes[0].tolist() == [127, 0, 2, 2, 0, -2, 0]
    for storage in QUANTISED:
        used = to_numpy(module(backend, "storage").stored(to_device(backend, weight * 0.01, "float32"), storage))
        if storage_class(storage) != "fp8":  # e4m3 has a minus zero, and the artifact keeps it
            assert not np.signbit(used[used == 0]).any()


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_not_finite_is_never_hidden(storage: Storage) -> None:
    for bad in (np.nan, np.inf, 1e30):
        weight = some_weight(64)
        weight[7, 3] = bad
        for backend in BACKENDS:
            used = to_numpy(module(backend, "storage").stored(to_device(backend, weight, "float32"), storage))
            row = used[7].astype(np.float64)
            assert not np.isfinite(row).all(), (backend, bad)
            assert np.isfinite(np.delete(used, 7, 0)).all()


@pytest.mark.parametrize("storage", QUANTISED)
def test_the_error_is_what_the_class_can_do(storage: Storage) -> None:
    """Relative RMS error of Gaussian weights: what `skc info` and docs/log.md say about the classes."""
    bounds = {"ternary": (0.45, 0.56), "int4": (0.08, 0.16), "int5": (0.037, 0.075), "int6": (0.018, 0.035),
              "int7": (0.009, 0.018), "int8": (0.004, 0.009), "fp8": (0.02, 0.03)}  # fmt: skip
    weight = draw("error", 64, 256).astype(np.float32) * 0.02
    low, high = bounds[storage_class(storage)]
    assert low < relative_rms(decode(host("mlx", weight, storage, "float32"), storage), weight) < high
    assert np.abs(host("mlx", weight, storage, "float32").codes).max() == LARGEST[storage_class(storage)]


def stored_mini(matrix: Storage, table: Storage, **changes: Any) -> RunConfig:
    """Return `ablate`'s mini with other storage and with widths that do not fill their groups."""
    config = mini("ablate")
    model = changed(
        config.model,
        {"matrix_storage": matrix, "embedding.storage": table, "mlp.hidden": 189, "embedding.dim": 20, **changes},
    )
    return dataclasses.replace(config, model=model)


DEVIATIONS = {"deviations.mlp": 6.0, "deviations.attention": 5.0, "deviations.table": 14.0}
STORED = {
    "ternary/64 int8": stored_mini("ternary/64", "int8/row", output_norm="gain"),
    "int6/64 fp8": stored_mini("int6/64", "fp8/row", output_norm="none"),
    "int4/128 int6": stored_mini("int4/128", "int6/row"),
    "int8/64 int4": stored_mini("int8/64", "int4/row", output_norm="gain"),
    "int5/64 int7 by deviations": stored_mini("int5/64", "int7/row", **DEVIATIONS),
    "ternary/64g": stored_mini("ternary/64g", "float16"),
}


@pytest.mark.parametrize("name", STORED)
def test_models_of_every_class_agree_with_each_other_and_the_oracle(name: str) -> None:
    config = STORED[name]
    ours, theirs = (outcome(b, config, 1.0, dtype="float64") for b in BACKENDS)
    assert_same(ours, theirs, P2_FLOAT64)
    batch, weights = batches(config, 1)[0], working_weights(config.model, 1.0)
    expected = oracle.model(config.model, reference.stored_weights(config.model, weights), batch.tokens)
    assert relative_rms(ours["logits"], expected) <= P2_FLOAT64
    ours, theirs = (by_group(outcome(b, config, 1.0, dtype="float32"), config) for b in BACKENDS)
    assert_same(ours, theirs, P2_FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STORED)
def test_gradients_go_straight_through(name: str, backend: str) -> None:
    """The gradient that a step gives to the weights is, bit for bit, the gradient at their stored form."""
    config, batch = STORED[name], batches(STORED[name], 1)[0]
    weights = working_weights(config.model, 1.0)
    made = engine(backend, config, weights, dtype="float32")
    loss, grads = made.gradients(batch)
    decoded = {n: decode(s, param_table(config.model)[n].storage) for n, s in made.quantised().items()}
    assert all(made.weights()[n].tobytes() == value.tobytes() for n, value in decoded.items())
    made.load_params(decoded)
    assert made.gradients(batch)[0] == loss
    for key, value in made.gradients(batch)[1].items():
        assert value.tobytes() == grads[key].tobytes(), key
    made.load_params(weights)
    assert made.gradients(batch)[0] != loss, "weights as they are give another loss"


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoded_ternary_weights_must_not_be_quantised_again(backend: str) -> None:
    """The original reloaded its export into layers that quantised it again, which shrank every weight."""
    config = mini("ablate")
    made = engine(backend, config, working_weights(config.model, 1.0), dtype="float32")
    decoded = made.weights()
    made.load_params(decoded)
    assert all(made.weights()[n].tobytes() == value.tobytes() for n, value in decoded.items())
    made.load_params(decoded, quantise=True)
    name = "blocks.0.mlp.up.weight"
    shrunk = np.abs(made.weights()[name]).sum() / np.abs(decoded[name]).sum()
    assert 0.6 < shrunk < 0.8, "by mean|q|, about 0.69 for Gaussian weights"


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plan_switches_quantisation_on_in_the_warm_down(backend: str) -> None:
    config = with_train(mini("ablate"), quantise="late", quantise_below=0.4, steps=10, warmdown=0.5, warmup=0.1)
    made = engine(backend, config, dtype="float32")
    seen = []
    for step, batch in enumerate(batches(config, 10)):
        plan = schedule.plan(step, schedule.progress_by_steps(step, config.train), config.train)
        before = made.params()
        made.load_params(before, plan.quantise)
        gradient_norm = np.sqrt(
            sum(float((g.astype(np.float64) ** 2).sum()) for g in made.gradients(batch)[1].values())
        )
        result = made.train_step(batch, plan).result()
        assert result.grad_norm == pytest.approx(gradient_norm, rel=1e-5), "the step used the weights of its plan"
        assert made.quantise == plan.quantise
        seen.append(plan.quantise)
        stored = {n: decode(s, param_table(config.model)[n].storage) for n, s in made.quantised().items()}
        used = made.weights()
        assert all(np.array_equal(used[n], stored[n]) for n in used) == plan.quantise
    assert seen == [False] * 8 + [True] * 2  # the scale is 0.64, 0.46, 0.28, 0.1 in the last four steps


def test_late_quantisation_does_not_start_in_the_warm_up() -> None:
    train = with_train(mini("ablate"), quantise="late", quantise_below=0.5, warmup=0.2, warmdown=0.2).train
    assert [schedule.quantise(p, train) for p in (0.01, 0.1, 0.5, 0.8, 0.89, 0.9, 0.95, 1.0, 1.2)] == [
        False, False, False, False, False, False, True, True, True,
    ]  # fmt: skip
    for rule, expected in (("never", False), ("always", True)):
        other = dataclasses.replace(train, quantise=rule)
        assert {schedule.quantise(p, other) for p in (0.0, 0.5, 1.0)} == {expected}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ternary", [False, True], ids=["floats only", "ternary too"])
def test_averages_are_seeded_late_scored_and_stored(backend: str, ternary: bool) -> None:
    changes = {"average_from": 0.5, "average_decay": 0.8, "average_ternary": ternary, "steps": 8}
    config = with_train(mini("ablate"), **changes)
    made, expected = engine(backend, config, dtype="float64"), {}
    averages = [n for n, r in param_table(config.model).items() if ternary or not r.storage.startswith("ternary")]
    for step, batch in enumerate(batches(config, 8)):
        plan = schedule.plan(step, schedule.progress_by_steps(step, config.train), config.train)
        made.train_step(batch, plan).result()
        params = made.params()
        if plan.average == 0:  # not begun: the average is the weights, and no start value lingers in it
            expected = {n: params[n] for n in averages}
        else:
            expected = {n: 0.8 * expected[n] + 0.2 * params[n] for n in averages}
    assert schedule.plan(3, 0.5, config.train).average == 0 and schedule.plan(4, 0.625, config.train).average == 0.8
    state, table = made.optimizer(), param_table(config.model)
    assert {name.removesuffix(".ema") for name in state if name.endswith(".ema")} == set(averages)
    for name in averages:
        assert relative_rms(state[f"{name}.ema"], expected[name]) < 1e-12
        assert not np.array_equal(state[f"{name}.ema"], params[name])
    exports = exported(config.model, config.train, params, state)
    used, stored = made.weights(), made.quantised()
    for name in table:
        chosen = state[f"{name}.ema"] if name in averages else params[name]
        assert np.array_equal(exports[name], chosen)
        kept = reference.quantise(chosen, table[name].storage)
        assert np.array_equal(used[name], reference.decode(kept, table[name].storage))
        assert np.array_equal(used[name], decode(stored[name], table[name].storage)), "scored is stored"


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_weights_follow_every_change(backend: str) -> None:
    """They are kept between scorings: a step, other weights and another average must each make them anew."""
    config = with_train(mini("ablate"), average_from=0.0, average_decay=0.5)
    made, batch = engine(backend, config, working_weights(config.model, 1.0), dtype="float32"), batches(config, 1)[0]
    table, seen = param_table(config.model), [made.nll(batch.tokens, batch.targets)]

    def step(number: int) -> None:
        made.train_step(batch, schedule.plan(number, 0.5, config.train)).result()

    def older_state() -> None:
        state = made.optimizer()
        made.load_optimizer({name: v * 1.5 if name.endswith(".ema") else v for name, v in state.items()})

    changes = [lambda: step(0), lambda: step(1), older_state, lambda: made.load_params(made.params(), False)]
    for change in changes:
        change()
        stored = made.quantised() if made.quantise else None
        for name, value in made.weights().items():
            expected = made.params()[name] if stored is None else decode(stored[name], table[name].storage)
            assert np.array_equal(value, expected), name
        seen.append(made.nll(batch.tokens, batch.targets))
        assert not np.array_equal(seen[-1], seen[-2])


def test_an_average_from_the_first_step_does_not_hold_start_values() -> None:
    train = with_train(mini("ablate"), average_from=0.0).train
    assert schedule.plan(0, 0.02, train).average == 0 and schedule.plan(1, 0.04, train).average == train.average_decay


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_quantisers_give_the_same_bits(backend: str) -> None:
    config = STORED["int6/64 fp8"]
    model = ModelConfig(**{**vars(config.model), "matrix_storage": "ternary/64"})
    config = dataclasses.replace(config, model=model)
    weights = working_weights(model, 1.0)
    eager, compiled = (engine(backend, config, weights, dtype="float32", compile=c) for c in (False, True))
    for name, value in eager.weights().items():
        assert compiled.weights()[name].tobytes() == value.tobytes(), name


FAULTS: dict[str, Any] = {
    "scale of another rounding": lambda s: {"_scales": lambda exact, honest=s._scales: honest(exact * 1.001)},
    "padding in the mean": lambda s: {"group_counts": lambda columns, size: [size] * -(-columns // size)},
    "no floor": lambda s: {"SCALE_FLOOR": SCALE_FLOOR / 2},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_catches(fault: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, weight = module(backend, "storage"), some_weight(189)
    for name, value in FAULTS[fault](storage).items():
        monkeypatch.setattr(storage, name, value)
    got, expected = host(backend, weight, "ternary/64", "float32"), reference.quantise(weight, "ternary/64")
    assert (got.scales != expected.scales).mean() > 0.02
