"""Changed predictions on the device: temperature, tilts and their moments, on both backends. Budget: 6 s."""

import functools
from typing import Any

import numpy as np
import pytest

from core.scoring.predictions import Prediction, Tilt
from shared_tests.support import predicted
from shared_tests.support.harness import BACKENDS
from shared_tests.support.known_scores import VOCAB, make_dataset
from shared_tests.support.plugin_examples import LENGTHS, fresh, small

ROWS, SEQ, MANY = 3, 16, 6
SUM = {"float64": 1e-12, "float32": 1e-6}
"""How far from 1 the probabilities of a prediction may add up to."""
SAME = {"float64": 1e-12, "float32": 1e-5}
"""Nats by which a prediction may differ from the oracle's, which is in float64."""


def text() -> tuple[np.ndarray, np.ndarray]:
    """Return rows of tokens and their targets."""
    tokens = make_dataset(LENGTHS).val.tokens[: ROWS * SEQ + 1]
    return tokens[:-1].reshape(ROWS, SEQ), tokens[1:].reshape(ROWS, SEQ)


def tilt(kind: Any, seed: int, above: float | None = None) -> Tilt:
    """Return random candidates: some are none, some twice at a position; of those that are mixed some leave nothing."""
    dice = np.random.default_rng(seed)
    ids, weights = dice.integers(-1, VOCAB, (ROWS, SEQ, MANY)), dice.random((ROWS, SEQ, MANY))
    ids[0, :, 1] = ids[0, :, 0]
    if kind == "mix":
        weights = weights / weights.sum(-1, keepdims=True) * 0.9 * dice.random((ROWS, SEQ, 1))
        ids[1, 0], weights[1, 0] = np.arange(MANY), [0.25, 0.25, 0.5, 0, 0, 0]
        ids[1, 0, 0] = text()[1][1, 0]  # what leaves nothing to others must know the target
        weights[2, 0] = 0
    else:
        weights = 8 * weights - 3
    return Tilt(ids.astype(np.int32), weights, kind, above)


def predictions(seed: int) -> dict[str, Prediction]:
    """Return every form of change."""
    sample = np.unique(np.random.default_rng(seed).integers(0, ROWS * SEQ, 20))
    return {
        "nothing": Prediction(),
        "temperature": Prediction(1.7, sample=sample),
        "flatter": Prediction(0.55, sample=sample),
        "mix": Prediction(tilt=tilt("mix", seed)),
        "boost": Prediction(tilt=tilt("boost", seed)),
        "boost where unsure": Prediction(tilt=tilt("boost", seed, 3.5)),
        "both": Prediction(0.8, tilt("mix", seed + 1), sample),
        "both, boost": Prediction(1.2, tilt("boost", seed + 1), sample),
    }


@functools.cache
def engine(backend: str, dtype: str) -> Any:
    """Return an engine with working weights, a bias and a softcap: these come before any change."""
    return fresh(backend, small(), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_prediction_is_the_oracles_and_adds_up_to_1(backend: str, dtype: str) -> None:
    tokens, targets = text()
    logits = engine(backend, dtype).logits(tokens)
    unsure = 0
    for seed in range(3):
        for name, prediction in predictions(seed).items():
            tape = engine(backend, dtype).predicted(tokens, targets, prediction)
            whole, expected = tape.logprobs(), predicted.logprobs(logits, prediction)
            sums = np.exp(whole.astype(np.float64)).sum(-1)
            assert np.abs(sums - 1).max() < SUM[dtype], name
            with np.errstate(invalid="ignore"):
                assert np.nanmax(np.abs(whole - expected)) < SAME[dtype], name
            assert (np.isinf(whole) == np.isinf(expected)).all()
            of_targets = np.take_along_axis(expected, targets[..., None].astype(np.int64), -1)[..., 0]
            assert np.abs(tape.nll() + of_targets).max() < SAME[dtype] and tape.nll().shape == targets.shape, name
            if prediction.sample is None:
                assert tape.moments() is None
            else:
                both = tape.moments(), predicted.moments(logits, targets, prediction)
                assert both[0].dtype == np.float64 and np.abs(both[0] / both[1] - 1).max() < SAME[dtype], name
            if name == "boost where unsure":
                plain = predicted.logprobs(logits, prediction._replace(tilt=None))
                unsure += int((np.abs(expected - plain).max(-1) > 1e-3).sum())
    assert 0 < unsure < 3 * ROWS * SEQ, "some are sure, some are not"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_changed_is_what_it_was(backend: str) -> None:
    """The same nats as the engine's, in chunks too, whose state goes on."""
    model, (tokens, targets) = engine(backend, "float64"), text()
    assert np.abs(model.predicted(tokens, targets, Prediction()).nll() - model.nll(tokens, targets)).max() < 1e-13
    state, nats = model.start(ROWS), []
    for part in (slice(0, 5), slice(5, SEQ)):
        tape = model.predicted(tokens[:, part], targets[:, part], Prediction(), state)
        nats.append(tape.nll())
        state = model.commit(tape, tokens[:, part].shape[1])
    assert np.abs(np.concatenate(nats, axis=1) - model.nll(tokens, targets)).max() < 1e-12


def test_backends_agree() -> None:
    tokens, targets = text()
    for prediction in predictions(0).values():
        tapes = [engine(backend, "float64").predicted(tokens, targets, prediction) for backend in BACKENDS]
        assert np.abs(tapes[0].nll() - tapes[1].nll()).max() < 1e-12
        if prediction.sample is not None:
            assert np.abs(tapes[0].moments() - tapes[1].moments()).max() < 1e-9


def test_moments_are_those_of_the_cost() -> None:
    """By differences of the cost itself."""
    tokens, targets = text()
    sample, h = np.arange(4, 40), 1e-4
    for b in (1.0, 1.3, 0.6):
        cost = [
            engine("cuda", "float64").predicted(tokens, targets, Prediction(x)).nll().reshape(-1)[sample].sum()
            for x in (b - h, b, b + h)
        ]
        pull, curvature = engine("cuda", "float64").predicted(tokens, targets, Prediction(b, sample=sample)).moments()
        assert curvature * b - pull == pytest.approx((cost[2] - cost[0]) / (2 * h), rel=1e-6)
        assert curvature == pytest.approx((cost[2] - 2 * cost[1] + cost[0]) / h**2, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": np.full((2, 2, 1), 9)}, "tokens below 9"),
        ({"weights": np.full((2, 2, 1), np.nan)}, "finite weights"),
        ({"weights": np.full((2, 2, 1), 1.1)}, "add up to at most 1"),
        ({"weights": np.full((2, 2, 1), -0.1)}, "from 0 up"),
        ({"ids": np.zeros((2, 3, 1), int), "weights": np.zeros((2, 3, 1))}, r"expected \(\*\(2, 2\), candidates\)"),
        ({"weights": np.zeros((2, 2, 2))}, "expected"),
    ],
)
def test_a_tilt_that_is_no_distribution_is_refused(change: dict[str, Any], words: str) -> None:
    good = Tilt(np.zeros((2, 2, 1), int), np.full((2, 2, 1), 1.0), "mix")
    good.check((2, 2), 9)
    good._replace(kind="boost", weights=np.full((2, 2, 1), -7.0)).check((2, 2), 9)
    with pytest.raises(ValueError, match=words):
        good._replace(**change).check((2, 2), 9)
