"""Planted faults: each check that holds the twins together fails when a fault of its kind is planted. Budget: 40 s."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.check.tolerances import P2_FLOAT32, P2_FLOAT64, P3_FLOAT32, P4_FLOAT32, relative_rms
from core.model.tables import rope_tables
from core.training import schedule
from shared_tests import oracle
from shared_tests.reference import ops as reference
from shared_tests.support.harness import (
    BACKENDS,
    batches,
    call,
    engine,
    mini,
    module,
    to_device,
    tokens,
    working_weights,
)
from shared_tests.support.twins import by_group, outcome

pytestmark = pytest.mark.pair
Plant = Callable[[Any], Callable]


def wrong_rope_sense(ops: Any) -> Callable:
    honest = ops.rope
    return lambda x, cos, sin: honest(x, cos, -sin)


def rope_base_off_by_a_percent(ops: Any) -> Callable:
    honest = ops.rope

    def faulty(x, cos, sin):
        backend = "mlx" if "mlx" in type(x).__module__ else "cuda"
        tables = rope_tables(cos.shape[0], 2 * cos.shape[1], 10_100.0)
        return honest(x, *(to_device(backend, t, str(x.dtype).split(".")[-1]) for t in tables))

    return faulty


def default_eps(ops: Any) -> Callable:
    honest = ops.rms_norm
    return lambda x, eps, exact, gain=None: honest(x, 1e-5, exact, gain)


def heads_interleaved(ops: Any) -> Callable:
    honest = ops.attention

    def faulty(q, k, v, mask, exact, **form):
        swap = [1, 0] if k.shape[1] == 2 else [0]
        return honest(q, k[:, swap], v[:, swap], mask, exact, **form)

    return faulty


def unscaled_scores(ops: Any) -> Callable:
    honest = ops.attention
    return lambda q, k, v, mask, exact, **form: honest(q * 1.001, k, v, mask, exact, **form)


def slope_of_another_activation(ops: Any) -> Callable:
    return lambda x, exact: ops.relu2(x, exact) + 1e-4 * x * x


def soft_cap_by_a_polynomial(ops: Any) -> Callable:
    return lambda x, cap, exact: x - x**3 / (3 * cap**2)


FORWARD = {
    "rope": (wrong_rope_sense, rope_base_off_by_a_percent),
    "rms_norm": (default_eps,),
    "attention": (heads_interleaved, unscaled_scores),
    "leaky_relu2": (slope_of_another_activation,),
    "softcap": (soft_cap_by_a_polynomial,),
}
PLANTS = [(op, plant) for op, plants in FORWARD.items() for plant in plants]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op, plant", PLANTS, ids=[plant.__name__ for _, plant in PLANTS])
def test_p2_catches(op: str, plant: Plant, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 too, hot or cold: the limit lies below the smallest fault."""
    config = mini("tiny")
    other = BACKENDS[1 - BACKENDS.index(backend)]
    honest = [by_group(outcome(other, config, scale, dtype="float32"), config) for scale in (1.0, 5.0)]
    # MLX trains through a form of its own
    ops = module(backend, "attention" if (op, backend) == ("attention", "mlx") else "ops")
    faulty = plant(ops)
    monkeypatch.setattr(ops, op, faulty)
    if op == "leaky_relu2":  # bound by name when the block is imported
        monkeypatch.setitem(module(backend, "parts.mlp").ACTIVATIONS, op, faulty)
    for scale, expected in zip((1.0, 5.0), honest, strict=True):
        got = by_group(outcome(backend, config, scale, dtype="float32"), config)
        if max(relative_rms(got[name], expected[name]) for name in expected) > P2_FLOAT32:
            return
    pytest.fail("the fault went unnoticed")


def test_p1_catches_a_mask_aligned_top_left() -> None:
    """What is_causal does with a cache in torch: invisible while queries and keys are equally many."""
    ours = reference.causal_mask(3, 7, None)
    top_left = np.arange(7)[None, :] <= np.arange(3)[:, None]
    for backend in BACKENDS:
        (got,) = call(backend, module(backend, "ops").causal_mask, (3, 7, None), "float32")
        assert np.array_equal(got, ours) and not np.array_equal(got, top_left)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p3_catches_a_missing_bias_correction(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared_tests.support.optimizer_cases import twenty_updates

    expected = twenty_updates(BACKENDS[1 - BACKENDS.index(backend)], "float32")
    optim = module(backend, "optim")
    honest = optim.adamw
    monkeypatch.setattr(
        optim,
        "adamw",
        lambda param, grad, m, v, lr, decay, bias1, bias2, *rest: honest(param, grad, m, v, lr, decay, 1.0, 1.0, *rest),
    )
    assert max(map(relative_rms, twenty_updates(backend, "float32"), expected)) > P3_FLOAT32


def losses(backend: str, steps: int = 12, restore: bool = True) -> np.ndarray:
    """Return the losses of a run that stops half-way and goes on from its saved state."""
    config, data = mini("debug"), batches(mini("debug"), 3)
    made, out = engine(backend, config, dtype="float32"), []
    for step in range(steps):
        if step == steps // 2:
            params, state = made.params(), made.optimizer()
            made = engine(backend, config, params, dtype="float32")
            if restore:
                made.load_optimizer(state)
        out.append(made.train_step(data[step % 3], schedule.plan(step, 0.5, config.train)).result().loss)
    return np.array(out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p4_catches_an_optimizer_state_that_is_not_restored(backend: str) -> None:
    expected = losses(BACKENDS[1 - BACKENDS.index(backend)])
    assert np.abs(losses(backend) - expected).max() <= P4_FLOAT32
    assert np.abs(losses(backend, restore=False) - expected).max() > P4_FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_p4_catches_decay_on_the_embedding(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(BACKENDS[1 - BACKENDS.index(backend)])
    optim = module(backend, "optim")
    honest = optim.rule

    def faulty(train, group, param, grad, slots, hyper, *rest):
        return honest(train, group, param, grad, slots, {**hyper, "decay_embed": 0.1}, *rest)

    monkeypatch.setattr(optim, "rule", faulty)
    assert np.abs(losses(backend) - expected).max() > P4_FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_oracle_catches_a_fault_that_both_twins_share(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini("tiny")
    weights = working_weights(config.model, 1.0)
    rows = tokens("shared fault", 2, 20, config.model.vocab, config.model.bos)
    monkeypatch.setattr(module(backend, "ops"), "rope", wrong_rope_sense(module(backend, "ops")))
    got = engine(backend, config, weights, dtype="float64").logits(rows)
    assert relative_rms(got, oracle.model(config.model, weights, rows)) > P2_FLOAT64
