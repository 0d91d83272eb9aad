"""Decay reaches every parameter of its group and no other, whether the step had a gradient for it. Budget: 5 s."""

import numpy as np
import pytest

from core.config import RunConfig, changed
from core.data.batch import Batch
from core.engine.protocol import Arrays
from core.model.params import param_table
from core.training.schedule import plan
from shared_tests.support.harness import BACKENDS, batches, engine, mini, working_weights

pytestmark = pytest.mark.pair
DECAYS = {"": 0.1, "_embed": 0.2, "_vector": 0.3, "_hash": 0.4}
"""Of each group; that of the matrices has no name of its own."""


def run_of(rule: str, decays: bool) -> RunConfig:
    """Return a run with parameters of every group, some of them without a gradient."""
    model = {"repeat_layers": (1,), "bigram.buckets": 401, "bigram.dim": 4}
    train = {"matrix_rule": rule, "repeat_from": 0.9, **{f"weight_decay{k}": v * decays for k, v in DECAYS.items()}}
    changes = {f"model.{name}": value for name, value in model.items()}
    return changed(mini("debug"), {**changes, **{f"train.{name}": value for name, value in train.items()}})


def stepped(backend: str, config: RunConfig, batch: Batch) -> tuple[Arrays, Arrays]:
    """Return parameters and optimizer state after one step, before layers are repeated."""
    made = engine(backend, config, working_weights(config.model, 1.0), dtype="float64")
    now = plan(0, 0.3, config.train)
    assert not now.repeat
    made.train_step(batch, now).result()
    return made.params(), made.optimizer()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_decay_is_added_to_the_update_of_every_parameter(rule: str, backend: str) -> None:
    """Decoupled: w - lr (update + decay w), and the update is what it is without decay; 0 where there is no gradient.

    Muon alone leaves a matrix without a gradient as it is (test_optim.py).
    """
    config = run_of(rule, True)
    start, batch = working_weights(config.model, 1.0), batches(config, 1)[0]
    (plain, _), (decayed, state) = (stepped(backend, run_of(rule, on), batch) for on in (False, True))
    still, groups, train = set(), set(), config.train
    for name, row in param_table(config.model).items():
        decay = DECAYS["" if row.group == "matrix" else f"_{row.group}"]
        expected = plain[name] - getattr(train, f"lr_{row.group}") * decay * start[name].astype(np.float64)
        np.testing.assert_allclose(decayed[name], expected, rtol=0, atol=1e-15, err_msg=name)
        groups.add(row.group)
        still |= {row.group} if (start[name][state[f"{name}.m"] == 0] != 0).any() else set()
    assert groups == {"embed", "matrix", "vector", "hash"}
    assert still == {"vector", "hash"}, "scales of repeats that are not yet, and buckets that nothing fell into"
