"""Windows with carry score what one long window would, whatever the batch, and go on after a kill. Budget: 30 s."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core.config import ConfigError, EvalConfig
from core.engine.protocol import Engine
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.score import score
from shared_tests.support.harness import BACKENDS, HYBRID, engine, mini, working_weights
from shared_tests.support.known_scores import make_dataset

pytestmark = pytest.mark.pair
LENGTHS = [5, 40, 1, 17, 16, 2, 33, 90, 3, 1]


def made(backend: str, name: str = HYBRID, **model: Any) -> Engine:
    config = mini(name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    return engine(backend, config, working_weights(config.model, 2.0), dtype="float64")


def config(**changes: Any) -> EvalConfig:
    return EvalConfig(**{"windows": "stateful", "seq": 16, "batch": 4, **changes})


def whole_documents(model: Engine, dataset: Any) -> np.ndarray:
    """Return the nats of every target, each document in one window."""
    split, out = dataset.val, []
    ends = [*split.document_starts[1:], len(split) - 1]
    for begin, end in zip(split.document_starts, ends, strict=True):
        if end > begin:
            text = split.read(begin, end + 1)[None]
            out.append(model.nll(text[:, :-1], text[:, 1:])[0])
    return np.concatenate(out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_target_sees_its_whole_document(backend: str) -> None:
    dataset, model = make_dataset(LENGTHS), made(backend)
    wanted = whole_documents(model, dataset)
    for batch, seq in ((4, 16), (1, 16), (3, 7), (16, 128)):
        ledger = Ledger(len(dataset.val))
        found = score(model, Evaluation(dataset.val, config(batch=batch, seq=seq)), ledger)
        assert np.abs(ledger.entries["nats"] - wanted).max() <= 1e-11
        assert found.full and found.windows == f"stateful seq={seq}" and abs(found.nats - wanted.sum()) < 1e-9
    plain = score(model, Evaluation(dataset.val, config(windows="plain")))
    assert abs(plain.nats - found.nats) > 1e-3, "the carry must matter"


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_text_is_one_stream(backend: str) -> None:
    dataset, model = make_dataset(LENGTHS), made(backend, "skc_ablate", documents="packed")
    text = dataset.val.read(0, len(dataset.val))[None]
    wanted = model.nll(text[:, :-1], text[:, 1:])[0]
    ledger = Ledger(len(dataset.val))
    score(model, Evaluation(dataset.val, config(), isolated=False), ledger)
    assert np.abs(ledger.entries["nats"] - wanted).max() <= 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_estimate_is_its_documents_part_of_the_score(backend: str) -> None:
    dataset, model = make_dataset(LENGTHS), made(backend)
    full, some = Ledger(len(dataset.val)), Ledger(len(dataset.val))
    score(model, Evaluation(dataset.val, config()), full)
    found = score(model, Evaluation(dataset.val, config(seed=3), 5), some)
    written = some.entries["order"] > 0
    assert 0 < written.sum() < len(written) and not found.full and found.documents == 5
    assert np.abs(some.entries["nats"][written] - full.entries["nats"][written]).max() <= 1e-11


class Killed(Exception):
    """What a test kills an evaluation with."""


def test_a_killed_score_goes_on_to_the_same_numbers() -> None:
    dataset, model = make_dataset(LENGTHS), made("cuda")
    whole = Ledger(len(dataset.val))
    expected = score(model, Evaluation(dataset.val, config()), whole)
    ledger, seen = Ledger(len(dataset.val)), []

    def kill(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 3:
            raise Killed

    with pytest.raises(Killed):
        score(model, Evaluation(dataset.val, config()), ledger, progress=kill)
    before = int((ledger.entries["order"] > 0).sum())
    assert 0 < before < len(ledger.entries)
    seen.clear()
    found = score(model, Evaluation(dataset.val, config()), ledger, progress=lambda *at: seen.append(at))
    assert np.abs(ledger.entries["nats"] - whole.entries["nats"]).max() <= 1e-11
    assert abs(found.bpb - expected.bpb) < 1e-12 and seen[-1][0] == seen[-1][1]


def test_carry_that_would_keep_every_key_is_refused() -> None:
    run = mini("baseline")
    with pytest.raises(ConfigError, match="keep the keys of every token"):
        dataclasses.replace(run, eval=config())
    with pytest.raises(ConfigError, match=r"eval.stride=4 has no meaning with eval.windows=stateful"):
        config(stride=4)
