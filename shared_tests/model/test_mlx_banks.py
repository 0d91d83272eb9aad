"""MLX's banks: what lies together in a row has the bits that every parameter would have alone. Budget: 6 s."""

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from backends.mlx import banks, optim, storage
from core.config import RunConfig, changed
from core.model.params import param_table
from core.model.storage import STORAGES
from core.training import schedule
from shared_tests.support.by_name import ByName
from shared_tests.support.harness import batches, draw, engine, mini, minis, working_weights

SCAFFOLDED = "scaffolded"
"""`ablate_float` with further heads, snapshots of the average, and stored weights that round softly."""
SHORT = {("debug", "adamw"), ("ablate", "muon"), (SCAFFOLDED, "muon")}
CASES = [
    pytest.param(name, rule, marks=() if (name, rule) in SHORT else pytest.mark.long)
    for name in (*minis(), SCAFFOLDED)
    for rule in ("adamw", "muon")
]


def averaging(name: str, rule: str) -> RunConfig:
    """Return the mini with a matrix rule, running averages of every parameter, and gradients that are clipped."""
    config, more = mini("ablate_float" if name == SCAFFOLDED else name), {}
    if name == SCAFFOLDED:
        config = dataclasses.replace(config, model=changed(config.model, {"matrix_storage": "int4/64", "layers": 1}))
        more = {"mtp_heads": 2, "snapshot_every": 3, "snapshot_below": 0.7, "quantise_soft": (1.0, 16.0)}
        more |= {"quantise": "late"}
    changes: Any = {"matrix_rule": rule, "average_from": 0.3, "average_ternary": True, "clip": 0.5, "steps": 20, **more}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def differing(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    """Return the names of the arrays that have other bits."""
    assert ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if value.tobytes() != theirs[name].tobytes()]


@pytest.mark.parametrize("name, rule", CASES)
def test_twenty_steps_have_the_bits_of_parameters_apart(name: str, rule: str) -> None:
    """Masters first, stored weights from the middle on, where another engine goes on from the saved arrays."""
    config = averaging(name, rule)
    made: Any = engine("mlx", config, working_weights(config.model, 0.3), dtype="float32")
    apart, seen = ByName(config, made), set()
    for step, batch in enumerate(batches(config, 20)):
        if step == 10:
            params, state = made.params(), made.optimizer()
            made = engine("mlx", config, params, dtype="float32")
            made.load_optimizer(state)
        plan = dataclasses.replace(schedule.plan(step, (step + 1) / 20, config.train), quantise=step >= 10)
        result = made.train_step(batch, plan).result()
        assert tuple(result) == apart.train_step(batch, plan) and result.finite
        seen.add(result.loss)
    assert len(seen) > 15 and not differing({**made.params(), **made.optimizer()}, apart.arrays())


@pytest.mark.parametrize("kind", STORAGES)
def test_a_row_is_stored_as_its_parameters_are(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every class: whole groups, last groups that are shorter, groups that are longer than a row, ties, zeros."""
    shapes = {"a": (5, 128), "b": (3, 256), "c": (4, 100), "d": (5, 128), "e": (2, 190), "f": (3, 64), "g": (6, 100)}
    row = next(iter(param_table(mini("debug").model).values()))
    table = {name: row._replace(shape=shape, storage=kind) for name, shape in shapes.items()}
    monkeypatch.setattr(banks, "param_table", lambda config: table)
    (bank,) = banks.banks(None, {})
    weights = {}
    for name, shape in shapes.items():
        value = draw(f"bank/{name}", *shape).astype(np.float32) * 0.02
        value[0], value[1, ::2] = 0.0, 1e-7
        value[-1] = np.round(4 * value[-1] / 0.02) / 4  # halves and quarters of a scale
        weights[name] = mx.array(value)
    together = {name: np.array(v) for name, v in bank.parts(bank.stored(bank.joined(weights))).items()}
    apart = {name: np.array(storage.stored(weights[name], kind)) for name in bank.names}
    assert sorted(together) == sorted(shapes) and not differing(together, apart)


def test_neighbours_are_of_one_shape_and_in_the_tables_order() -> None:
    """Every parameter lies in one bank, once, and stacks are as long as they can be."""
    model = mini("skc_mac").model
    table, made = param_table(model), banks.banks(model, {})
    assert sorted(name for bank in made for name in bank.names) == sorted(table)
    assert len({bank.key for bank in made}) == len(made) < len(table) / 10
    for bank in made:
        assert len({stack.shape for stack in bank.stacks}) == len(bank.stacks)
        assert bank.stacks[-1].end == sum(table[name].size for name in bank.names)
        for stack in bank.stacks:
            assert list(stack.names) == [name for name in table if name in stack.names]


@pytest.mark.parametrize("name", ["debug", "skc_mac"])
@pytest.mark.parametrize("bad, of_all", [(np.nan, True), (np.inf, True), (np.nan, False)])
def test_a_step_that_is_not_finite_keeps_every_bit(bad: float, of_all: bool, name: str) -> None:
    """Of masters, moments and averages: clipping makes all gradients bad where one is; else others are good."""
    config = averaging(name, mini(name).train.matrix_rule)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, clip=0.5 if of_all else None))
    made: Any = engine("mlx", config, dtype="float32")
    data = batches(config, 2)
    assert made.train_step(data[0], schedule.plan(0, 0.5, config.train)).result().finite
    before = {**made.params(), **made.optimizer()}
    for key in made.optimizer():
        if not key.endswith(".v"):
            before[key].flat[0] = -0.0
    made.load_optimizer({name: before[name] for name in made.optimizer()})
    first = next(iter(made._params))
    grads = {key: mx.full(row.shape, bad if of_all or key == first else 1.0) for key, row in made._params.items()}
    hyper = mx.array(np.array(schedule.plan(1, 0.5, config.train).numbers), mx.float32)
    params, state, *_, finite = made._finish(made._params, made._state, grads, mx.array(1.0), hyper, mx.array(1.0))
    made._params, made._state = params, state
    assert not finite.item() and not differing({**made.params(), **made.optimizer()}, before)


def test_a_guard_that_lets_a_gradient_through_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN * 0 is NaN: rates of zero alone are no guard."""
    honest = optim.rule

    def unguarded(train: Any, group: str, param: Any, grad: Any, slots: Any, hyper: Any, *rest: Any) -> Any:
        rates = {key: mx.where(hyper["finite"], value, 0.0) for key, value in hyper.items() if key.startswith("lr_")}
        return honest(train, group, param, grad, slots, {**hyper, **rates, "finite": mx.array(True)}, *rest)

    monkeypatch.setattr(optim, "rule", unguarded)
    with pytest.raises(AssertionError):
        test_a_step_that_is_not_finite_keeps_every_bit(np.nan, True, "debug")


def test_an_embedding_in_another_storage_is_another_bank() -> None:
    """A bank has one storage, since it is quantised at once."""
    model = changed(mini("tiny").model, {"matrix_storage": "int8/64", "embedding.storage": "int6/row"})
    assert [bank.key for bank in banks.banks(model, {})][:2] == ["embed/int6/row", "matrix/int8/64"]


@pytest.mark.parametrize("shared, wide", [(None, False), (1, True)])
def test_the_gradients_of_a_matrix_that_is_used_twice_are_added_up_wide(shared: int | None, wide: bool) -> None:
    """In bfloat16: what one use gives has 8 digits, the sum of two uses more."""
    config = mini("debug")
    config = dataclasses.replace(config, model=changed(config.model, {"layers": 2, "shared_blocks": shared}))
    made: Any = engine("mlx", config, working_weights(config.model, 1.0), dtype="bfloat16")
    _, grads = made.gradients(batches(config, 1)[0])
    digits = grads["blocks.0.mlp.up.weight"].view(np.uint32) & 0xFFFF
    assert (np.mean(digits != 0) > 0.1) == wide
