"""Where the numbers of a weight lie: row after row, wherever it comes from. Budget: 15 s.

BLAS multiplies a matrix that lies otherwise by another path, which may round otherwise: an engine that trained and one
that loaded the same weights would then differ. Which processors do so is not asked here: strides are looked at.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core.engine.optimizer_state import averaged
from core.training import schedule
from shared_tests.support.harness import BACKENDS, batches, engine, mini, minis, module, shortened, to_device

pytestmark = pytest.mark.pair


def row_after_row(value: Any) -> bool:
    """Return whether an array of a backend has no gaps and its last axis moves first; axes of length 1 do not count."""
    if hasattr(value, "is_contiguous"):
        shape, strides = tuple(value.shape), value.stride()
    else:
        view: Any = memoryview(value)  # MLX: the only way to its strides
        shape, strides = view.shape, [step // view.itemsize for step in view.strides]
    expected = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return all(step == want for n, step, want in zip(shape, strides, expected, strict=True) if n > 1)


def elsewhere(made: Any) -> list[str]:
    """Return what of an engine does not lie row after row: masters, state, weights of training and of scoring."""
    places = {
        "masters": made._params, "state": made._state, "scored": made._scored(),
        "trained": made._trained(made._params, made.quantise), "stored": made._trained(made._params, True),
    }  # fmt: skip
    if made.backend == "mlx":  # rows, and what the model sees of them
        places |= {f"parts of {place}": made._named(places[place]) for place in ("masters", "trained", "stored")}
    return [f"{place} {n}" for place, held in places.items() for n, value in held.items() if not row_after_row(value)]


def by_columns(backend: str, value: Any) -> Any:
    """Return the same numbers column after column."""
    if len(value.shape) < 2:
        return value
    if backend == "cuda":
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    import mlx.core as mx

    return mx.swapaxes(mx.contiguous(mx.swapaxes(value, -1, -2)), -1, -2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_otherwise_is_seen(backend: str) -> None:
    """Columns first, a slice of wider rows, every other row; not axes of length 1."""
    whole = to_device(backend, np.arange(24.0).reshape(4, 6), "float32")
    faults = [by_columns(backend, whole), whole[:, :4], whole[::2], whole[:, 1:]]
    assert [row_after_row(fault) for fault in faults] == [False] * 4
    fine = [whole, whole[1:], by_columns(backend, whole[:1]), by_columns(backend, whole[:, :1] * 1), whole[0, 0]]
    assert [row_after_row(value) for value in fine] == [True] * 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shortened(minis()))
def test_weights_lie_row_after_row(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When an engine is built, has trained and has loaded, whatever the rules, the averages and the files give it."""
    config = mini(name)
    train = dataclasses.replace(config.train, average_from=0.1, average_decay=0.9, average_ternary=True)
    config = dataclasses.replace(config, train=train)
    optim = module(backend, "optim")
    rule, average = optim.rule, optim.average

    def turned_rule(*given: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
        param, slots = rule(*given, **more)
        return by_columns(backend, param), {slot: by_columns(backend, value) for slot, value in slots.items()}

    monkeypatch.setattr(optim, "rule", turned_rule)
    monkeypatch.setattr(optim, "average", lambda *given: by_columns(backend, average(*given)))
    made: Any = engine(backend, config, dtype="float32")
    assert not elsewhere(made), "built"
    for step, batch in enumerate(batches(config, 2)):
        made.train_step(batch, schedule.plan(step, 0.5, train)).result()
    assert len(averaged(config.model, train)) == len(made.weights()) and not elsewhere(made), "trained"
    kept = [{name: np.asfortranarray(value) for name, value in d.items()} for d in (made.params(), made.optimizer())]
    made.load_params(kept[0], made.quantise)
    made.load_optimizer(kept[1])
    assert not elsewhere(made), "loaded"


def test_matrices_that_came_out_by_columns_go_back_into_a_row() -> None:
    """Tall matrices leave Newton-Schulz so: what is joined and taken apart again is the same, row after row."""
    import mlx.core as mx

    banks = module("mlx", "banks")
    bank: Any = banks.banks(mini("tiny").model, {})[1]
    arrays = {n: mx.array(np.arange(np.prod(s.shape)).reshape(s.shape)) for s in bank.stacks for n in s.names}
    row = bank.joined({name: by_columns("mlx", value) for name, value in arrays.items()})
    parts = bank.parts(row)
    assert bank.group == "matrix" and any(stack.shape[0] > stack.shape[1] for stack in bank.stacks)
    assert all(row_after_row(value) and np.array_equal(value, arrays[name]) for name, value in parts.items())
