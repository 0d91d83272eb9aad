"""Snapshots of the average (train.snapshot_every): their mean is what is scored and stored. Budget: 10 s."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.check.tolerances import relative_rms
from core.config import ConfigError, RunConfig, TrainConfig
from core.data.batch import Batch
from core.engine.optimizer_state import averaged, exported, optimizer_slots
from core.model.params import param_table
from core.model.storage import decode
from core.training import schedule
from core.training.run import Run
from shared_tests.support.harness import BACKENDS, batches, engine, mini

STEPS = 12


def of(name: str = "ablate", **train: Any) -> RunConfig:
    """Return a run that takes a snapshot after every second of its last steps."""
    base = mini(name)
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, layers=1))
    settings: dict[str, Any] = {
        "steps": STEPS, "warmup": 0.0, "warmdown": 0.75, "floor": 0.0, "average_from": 0.2, "average_decay": 0.6,
        "snapshot_every": 2, "snapshot_below": 0.6,
    }  # fmt: skip
    return dataclasses.replace(base, train=dataclasses.replace(base.train, **(settings | train)))


def go(made: Any, config: RunConfig, steps: range, **planned: Any) -> list[bool]:
    """Take steps, and return after which of them a snapshot was taken."""
    data, taken = batches(config, STEPS), []
    for step in steps:
        plan = schedule.plan(step, schedule.progress_by_steps(step, config.train), config.train)
        made.train_step(data[step], dataclasses.replace(plan, **planned)).result()
        taken.append(plan.snapshot)
    return taken


def test_they_are_taken_every_so_often_in_the_warm_down() -> None:
    def steps(**changes: Any) -> list[int]:
        train = of(**changes).train
        plans = [schedule.plan(s, schedule.progress_by_steps(s, train), train) for s in range(STEPS)]
        return [plan.step for plan in plans if plan.snapshot]

    assert steps() == [7, 9, 11]
    assert steps(snapshot_every=3) == [8, 11] and steps(snapshot_below=0.3) == [9, 11]
    assert steps(average_from=0.8) == [9, 11], "an average that has not begun is none"
    assert steps(warmup=0.25, warmdown=0.25) == [11], "rates are as low in the warm-up"
    assert steps(snapshot_every=None) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ternary", [False, True], ids=["floats only", "ternary too"])
def test_the_mean_of_averages_is_scored_and_stored(ternary: bool, backend: str) -> None:
    config, seen = of(average_ternary=ternary), []
    made, table = engine(backend, config, dtype="float64"), param_table(config.model)
    names = averaged(config.model, config.train)
    assert ternary == any(table[name].storage.startswith("ternary") for name in names)
    for step in range(STEPS):
        (taken,) = go(made, config, range(step, step + 1))
        params, state = made.params(), made.optimizer()
        if taken:
            seen.append({name: state[f"{name}.ema"] for name in names})
        assert state["snapshots"].tolist() == [len(seen)]
        exports = exported(config.model, config.train, params, state)
        for name in table:
            if name not in names:
                expected = params[name]
            else:
                expected = np.mean([one[name] for one in seen], axis=0) if seen else state[f"{name}.ema"]
            assert relative_rms(exports[name], expected) < 1e-13, (step, name)
    assert len(seen) == 3 and not np.array_equal(state[f"{names[0]}.mean"], state[f"{names[0]}.ema"])
    used, stored = made.weights(), made.quantised()
    for name, row in table.items():
        assert np.array_equal(used[name], exports[name] if not made.quantise else decode(stored[name], row.storage))
    made.load_params(params)
    assert made.optimizer()["snapshots"] == 0 and not made.optimizer()[f"{names[0]}.mean"].any(), "weights begin anew"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_between_two_snapshots_to_the_bit(backend: str, tmp_path: Path) -> None:
    config = of("tiny")
    whole = engine(backend, config, dtype="float32")
    assert sum(go(whole, config, range(STEPS))) == 3
    half, run = engine(backend, config, dtype="float32"), Run.create(tmp_path / "run", config, b"no tokenizer")
    go(half, config, range(9))
    run.save(half, 9, 1.0)
    resumed = engine(backend, config, dtype="float32")
    run.restore(resumed)
    assert resumed.optimizer()["snapshots"] == 1
    for name, value in half.weights().items():
        assert resumed.weights()[name].tobytes() == value.tobytes(), name
    go(resumed, config, range(9, STEPS))
    ends = [{**made.params(), **made.optimizer(), **made.weights()} for made in (whole, resumed)]
    assert all(ends[1][name].tobytes() == value.tobytes() for name, value in ends[0].items())
    assert ends[0].keys() >= optimizer_slots(config.model, config.train).keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_stand_still_are_their_mean(backend: str) -> None:
    config, still = of("tiny"), dict.fromkeys(("lr_embed", "lr_matrix", "lr_vector", "lr_hash"), 0.0)
    made = engine(backend, config, dtype="float32")
    start = made.params()
    go(made, config, range(STEPS), average=0.0, **still)
    assert made.optimizer()["snapshots"] == 3
    for name, value in start.items():
        assert made.weights()[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_not_finite_takes_none(backend: str) -> None:
    config = of("tiny")
    made, (batch,) = engine(backend, config, dtype="float32"), batches(config, 1)
    go(made, config, range(8))
    before = made.optimizer()
    plan = dataclasses.replace(schedule.plan(9, 10 / STEPS, config.train), lr_embed=0.01)
    assert plan.snapshot and before["snapshots"] == 1
    poisoned = made.params()
    poisoned["embed.weight"][:] = np.nan
    state = made.optimizer()
    made.load_params(poisoned)
    made.load_optimizer(state)
    assert not made.train_step(Batch(batch.tokens, batch.targets), plan).result().finite
    assert all(made.optimizer()[name].tobytes() == value.tobytes() for name, value in before.items())


def test_without_them_nothing_is_kept() -> None:
    config = of("tiny", snapshot_every=None)
    assert not [name for name in optimizer_slots(config.model, config.train) if "mean" in name or "snapshots" in name]
    for backend in BACKENDS:
        assert not engine(backend, config, dtype="float32")._means  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"snapshot_every": 5}, "train.snapshot_every takes nothing without train.average_from"),
        ({"snapshot_every": 0, "average_from": 0.0}, "train.snapshot_every=0: expected a positive number"),
        ({"snapshot_every": 5, "average_from": 0.0, "floor": 0.2}, "train.snapshot_every=5 would never take one"),
        ({"snapshot_every": 5, "average_from": 0.0, "warmdown": 0.0}, "would never take one"),
        ({"snapshot_below": 1.5}, "train.snapshot_below=1.5: expected a share"),
    ],
)
def test_what_would_take_none_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**given)
