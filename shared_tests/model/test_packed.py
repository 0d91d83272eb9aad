"""Packed n-gram tables: rows that training text hardly uses are zero at every stage of a run. Budget: 20 s."""

from pathlib import Path

import numpy as np
import pytest

from core.model.params import start_values
from core.training import schedule
from core.training.pruning import keep_rows, start_weights
from shared_tests.support.exchanged import assert_same, export, rows_of
from shared_tests.support.harness import BACKENDS, batches, engine, mini, tokens

pytestmark = pytest.mark.pair
CONFIG = mini("skc_600")


class Text:
    """A training text in memory."""

    def __init__(self) -> None:
        self.tokens = tokens("packed", 1, 3000, CONFIG.model.vocab, CONFIG.model.bos)[0]

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def test_a_run_starts_from_the_rows_that_its_text_uses_most() -> None:
    text, model = Text(), CONFIG.model
    weights, whole = start_weights(CONFIG, text), start_values(model, CONFIG.seed)  # type: ignore[arg-type]
    table, kept = weights.pop("engram.table"), keep_rows(model, text.tokens)
    before = whole.pop("engram.table")
    assert all(np.array_equal(weights[name], value) for name, value in whole.items())
    assert np.array_equal(table.any(axis=1), kept) and np.array_equal(table[kept], before[kept])
    shares = kept.reshape(model.engram.orders, -1).mean(axis=1)
    assert np.abs(shares - model.engram.keep).max() < 1 / model.engram.buckets


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_rows_are_zero_in_training_artifact_and_scoring(backend: str, tmp_path: Path) -> None:
    weights = start_weights(CONFIG, Text())  # type: ignore[arg-type]
    kept = weights["engram.table"].any(axis=1)
    made = engine(backend, CONFIG, weights, dtype="float32")
    for step, batch in enumerate(batches(CONFIG, 4)):
        assert not made.gradients(batch)[1]["engram.table"][~kept].any()
        made.train_step(batch, schedule.plan(step, 0.5, CONFIG.train)).result()
    table = made.params()["engram.table"]
    assert not table[~kept].any() and table[kept].any(axis=1).all()
    assert (table[kept] != weights["engram.table"][kept]).any(axis=1).mean() > 0.2, "rows in use must learn"
    artifact = export(made, CONFIG, tmp_path / "a.skc")
    assert not artifact.weights["engram.table"][~kept].any()
    assert_same(made.weights(), artifact.weights, "trained as it is stored")
    again = engine(backend, CONFIG, dtype="float32")
    again.load_params(artifact.weights)
    assert again.nll(*rows_of(CONFIG)).tobytes() == made.nll(*rows_of(CONFIG)).tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_keeps_the_rows_and_the_bits(backend: str) -> None:
    first = engine(backend, CONFIG, start_weights(CONFIG, Text()), dtype="float32")  # type: ignore[arg-type]
    run = batches(CONFIG, 4)
    for step, batch in enumerate(run):
        if step == 2:
            second = engine(backend, CONFIG, dtype="float32")
            second.load_params(first.params(), first.quantise)
            second.load_optimizer(first.optimizer())
        for made in (first,) if step < 2 else (first, second):
            made.train_step(batch, schedule.plan(step, 0.5, CONFIG.train)).result()
    assert_same(second.params(), first.params(), "resumed")
