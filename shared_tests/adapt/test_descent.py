"""The scored weights learn by SGD: numpy's, on both backends; only what is named; and back again. Budget: 20 s."""

import dataclasses

import numpy as np
import pytest

from core.config import RunConfig, changed
from core.data.batch import Batch
from core.engine.adapting import AdaptStep
from core.engine.protocol import Arrays, Engine
from core.model.scopes import loose_names
from core.scoring.adapt.freeze import Freeze
from core.scoring.ledger import LedgerError
from shared_tests.support.harness import BACKENDS, EVERYTHING, HYBRID, batches, draw, engine, mini, working_weights
from shared_tests.support.plugin_examples import held

pytestmark = pytest.mark.pair
SCALE = 2.0
"""Of the working weights: with it a step changes much."""
STEP = AdaptStep("sgd", 0.05, decay=0.1, momentum=0.9, clip=0.2)
"""All settings have a use: the norms are above the clip."""
TWINS = 1e-8
"""Weights and momenta after 20 updates, float64, absolute."""


def padded(config: RunConfig, step: int = 0) -> Batch:
    """Return seven rows, more than a micro-batch, of which one ends with pads and one is nothing else."""
    first, second = batches(config, step + 2)[step:]
    targets = np.concatenate([first.targets, second.targets[:3]])
    targets[1, 20:], targets[5] = -1, -1
    return Batch(np.concatenate([first.tokens, second.tokens[:3]]), targets)


def built(backend: str, config: RunConfig, dtype: str = "float64") -> Engine:
    return engine(backend, config, working_weights(config.model, SCALE), dtype=dtype)


def by_hand(config: RunConfig, names: list[str], weights: Arrays, batch: Batch, count: int) -> tuple[Arrays, Arrays]:
    """Return weights and momenta after `count` updates: numpy, with the gradients of training rows, one by one."""
    teacher = engine(
        "cuda", dataclasses.replace(config, train=dataclasses.replace(config.train, batch=1)), weights, dtype="float64"
    )
    now, momenta = dict(weights), {name: np.zeros_like(weights[name]) for name in names}
    for _ in range(count):
        teacher.load_params(now)
        total, real = dict.fromkeys(names, 0.0), (batch.targets >= 0).sum(1)
        for row in np.flatnonzero(real):
            short = Batch(batch.tokens[row : row + 1, : real[row]], batch.targets[row : row + 1, : real[row]])
            grads = teacher.gradients(short)[1]
            total = {name: total[name] + grads[name] * real[row] / real.sum() for name in names}
        norm = np.sqrt(sum(float(np.square(grad).sum()) for grad in total.values()))
        assert norm > STEP.clip, "the clip must matter"
        for name in names:
            momenta[name] = STEP.momentum * momenta[name] + total[name] * STEP.clip / (norm + 1e-6)
            now[name] = now[name] - STEP.lr * (momenta[name] + STEP.decay * now[name])
    return now, momenta


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_sgd(backend: str) -> None:
    """Momentum, decay, clip and the mean over targets are numpy's; pads and rows of pads count nothing."""
    config = mini("ablate_float")
    model, batch = built(backend, config), padded(config)
    weights, names = model.weights(), list(loose_names(config.model, ("blocks.*", "embed")))
    model.loosen(names)
    for _ in range(3):
        assert model.descend(batch, STEP).finite
    expected, momenta = by_hand(config, names, weights, batch, 3)
    found = model.loosened()
    assert list(found) == [*names, *(f"{name}.m" for name in names)]
    for name in names:
        assert np.abs(expected[name] - weights[name]).max() > 1e-5, name
        assert np.abs(found[name] - expected[name]).max() < 1e-12, name
        assert np.abs(found[f"{name}.m"] - momenta[name]).max() < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_that_of_the_scores(backend: str) -> None:
    """Along a direction drawn at random, of the mean nats that `nll` says: central differences."""
    config = mini(EVERYTHING)
    model, batch = built(backend, config), padded(config)
    real = batch.targets >= 0
    model.loosen(loose_names(config.model, ()))
    start = model.loosened()
    ways = {name: np.zeros_like(v) if name.endswith(".m") else draw(name, *v.shape) for name, v in start.items()}

    def cost(by: float) -> float:
        model.load_loosened({name: value + by * ways[name] for name, value in start.items()})
        return float(model.nll(batch.tokens, np.maximum(batch.targets, 0))[real].mean())

    slope = (cost(1e-6) - cost(-1e-6)) / 2e-6
    model.load_loosened(start)
    result = model.descend(batch, AdaptStep("sgd", 1.0, momentum=0.0))
    grads = {name: value - model.loosened()[name] for name, value in start.items() if not name.endswith(".m")}
    assert abs(result.loss - cost(0.0)) < 1e-10
    assert abs(sum(float((grads[name] * ways[name]).sum()) for name in grads) / slope - 1) < 1e-6
    assert all(grad.any() for grad in grads.values()), [name for name, grad in grads.items() if not grad.any()]


@pytest.mark.parametrize("name, scope", [(EVERYTHING, "all"), (HYBRID, "skc_safe")])
def test_twins_descend_alike(name: str, scope: str) -> None:
    config, ends = mini(name), []
    whole = batches(config, 1)[0]
    small = Batch(whole.tokens[:2, :14].copy(), whole.targets[:2, :14].copy())
    small.targets[1, 9:] = -1
    for backend in BACKENDS:
        model = built(backend, config)
        model.loosen(loose_names(config.model, (scope,)))
        losses = [model.descend(small, STEP).loss for _ in range(20)]
        ends.append(model.loosened() | {"losses": np.array(losses)})
    assert ends[0]["losses"][0] - ends[0]["losses"][-2:].min() > 1e-3, "nothing was learned"
    assert list(ends[0]) == list(ends[1])
    assert max(np.abs(value - ends[1][name]).max() for name, value in ends[0].items()) < TWINS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", ["ternary/64", "int6/row"])
def test_it_begins_with_the_artifact_and_ends_with_it(backend: str, storage: str) -> None:
    """Stored weights are taken as the floats that they decode to, and are not rounded again; the masters stay."""
    config = mini(HYBRID)
    config = dataclasses.replace(config, model=changed(config.model, {"matrix_storage": storage}))
    model, batch = built(backend, config, "float32"), padded(config)
    model.load_params(model.params(), quantise=True)
    names, before, stored = loose_names(config.model, ("*.weight",)), held(model), model.weights()
    score = model.nll(batch.tokens, batch.targets.clip(0))
    model.loosen(names)
    assert (model.nll(batch.tokens, batch.targets.clip(0)) == score).all()
    assert model.descend(batch, AdaptStep("sgd", 1e-3)).finite
    now = model.weights()
    for name, value in model.loosened().items():
        if name in names:
            moved = value != stored[name]
            assert moved.any() and (now[name] == value).all(), name
            assert np.abs(value - stored[name]).max() < 1e-2, f"{name} was rounded again"
    assert all(now[name].tobytes() == stored[name].tobytes() for name in now if name not in names)
    assert (model.nll(batch.tokens, batch.targets.clip(0)) != score).any()
    logits, state = model.logits(batch.tokens), model.start(len(batch.tokens))
    assert np.abs(model.chunk(state, batch.tokens).logits() - logits).max() < 1e-3, "chunks have other weights"
    assert all(value.tobytes() == before[f"params/{name}"] for name, value in model.params().items())
    model.tighten()
    assert held(model) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_named_moves(backend: str) -> None:
    config = mini(HYBRID)
    model, names = built(backend, config, "float32"), loose_names(config.model, ("skc_safe",))
    before = model.weights()
    model.loosen(names)
    freeze = Freeze(model, names)
    for _ in range(3):
        model.descend(padded(config), STEP)
    freeze.check()
    now = model.weights()
    assert [name for name in now if now[name].tobytes() != before[name].tobytes()] == list(names)
    model.loosen([*names, "embed.weight"])  # more than the check was told
    model.descend(padded(config), STEP)
    with pytest.raises(LedgerError, match="embed.weight has changed"):
        freeze.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_goes_on_to_the_bit(backend: str) -> None:
    config = mini("ablate_float")
    names, ends = loose_names(config.model, ("blocks.*",)), []
    first, second = built(backend, config, "float32"), built(backend, config, "float32")
    first.loosen(names)
    second.loosen(names)
    first.descend(padded(config), STEP)
    copy = first.loosened()
    second.load_loosened(copy)
    for model in (first, second):
        model.descend(padded(config, 1), STEP)
        ends.append(model.loosened())
    assert all(value.tobytes() == ends[1][name].tobytes() for name, value in ends[0].items())
    first.forget_momenta()
    cleared = first.loosened()
    assert all(cleared[f"{name}.m"].any() == 0 and (cleared[name] == ends[0][name]).all() for name in names)
    with pytest.raises(ValueError, match=r"loosened weights: blocks.0.mixer_scale.m is missing"):
        first.load_loosened({name: value for name, value in copy.items() if name != "blocks.0.mixer_scale.m"})
    with pytest.raises(ValueError, match="is not a parameter"):
        first.load_loosened({**copy, "embed.weight": copy["blocks.0.mixer_scale"]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_is_refused(backend: str) -> None:
    config = mini("ablate_float")
    model, batch = built(backend, config, "float32"), padded(config)
    for act in (model.loosened, model.forget_momenta, lambda: model.descend(batch, STEP)):
        with pytest.raises(ValueError, match="call loosen first"):
            act()
    with pytest.raises(ValueError, match="blocks.9.x is not a parameter"):
        model.loosen(["embed.weight", "blocks.9.x"])
    model.loosen(["embed.weight"])
    with pytest.raises(ValueError, match="not by adamw"):
        model.descend(batch, STEP._replace(rule="adamw"))
    with pytest.raises(ValueError, match="no target"):
        model.descend(Batch(batch.tokens, np.full_like(batch.targets, -1)), STEP)
    broken = model.loosened()
    broken["embed.weight"][3] = np.inf
    model.load_loosened(broken)
    result = model.descend(Batch(batch.tokens * 0 + 3, batch.targets), STEP)
    assert not result.finite
    assert all(value.tobytes() == broken[name].tobytes() for name, value in model.loosened().items())
