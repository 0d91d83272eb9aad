"""No output sees the future: flip, prefix and random-token tests on every preset's mini. Budget: 200 s."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core import schedule
from core.config import RunConfig
from core.engine import Batch
from shared_tests.harness import BACKENDS, engine, mini, minis, module, tokens, working_weights
from shared_tests.tolerances import CAUSAL

pytestmark = pytest.mark.pair
LENGTHS = (1, 15, 16, 17, 33, 64)


FORMS: dict[str, dict] = {"exact": {"dtype": "float64"}, "fast": {"dtype": "float32", "exact": False}}
"""The forms that carry the proofs, and those that train."""


def logits_of(backend: str, config: RunConfig, form: str = "exact") -> Callable[[np.ndarray], np.ndarray]:
    return engine(backend, config, working_weights(config.model, 2.0), **FORMS[form]).logits


def flip_leaks(logits: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, bos: int, vocab: int) -> float:
    """Return the largest change before position s over all s, when token s becomes another token or BOS."""
    base, worst = logits(rows), 0.0
    for s in range(rows.shape[1]):
        for changed_to in ((rows[:, s] + 7) % vocab, np.full(len(rows), bos)):
            changed = rows.copy()
            changed[:, s] = changed_to
            worst = max(worst, float(np.abs(logits(changed)[:, :s] - base[:, :s]).max(initial=0.0)))
    return worst


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", minis())
def test_flip(name: str, backend: str, form: str) -> None:
    config = mini(name)
    logits = logits_of(backend, config, form)
    for seq in LENGTHS:
        rows = tokens(f"flip/{seq}", 2, seq, config.model.vocab, config.model.bos)
        assert flip_leaks(logits, rows, config.model.bos, config.model.vocab) == 0.0, seq


@pytest.mark.parametrize("backend", BACKENDS)
def test_flip_test_catches_a_mask_that_is_one_off(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_leak(backend, monkeypatch)
    config = mini("tiny")
    rows = tokens("flip/17", 2, 17, config.model.vocab, config.model.bos, documents=False)
    assert flip_leaks(logits_of(backend, config), rows, config.model.bos, config.model.vocab) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", minis())
def test_prefix(name: str, backend: str) -> None:
    config = mini(name)
    logits = logits_of(backend, config)
    rows = tokens("prefix", 2, 64, config.model.vocab, config.model.bos)
    whole = logits(rows)
    for k in LENGTHS:
        assert np.abs(logits(rows[:, :k]) - whole[:, :k]).max() <= CAUSAL, k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", minis())
def test_documents_are_isolated_exactly_where_the_preset_says_so(name: str, backend: str) -> None:
    config = mini(name)
    bos, vocab = config.model.bos, config.model.vocab
    logits = logits_of(backend, config)
    rows = tokens("isolation", 2, 40, vocab, bos, documents=False)
    rows[:, 17] = bos
    base = logits(rows)
    changed = rows.copy()
    changed[:, 3] = (changed[:, 3] + 5) % vocab
    changed[changed == bos] = (bos + 1) % vocab
    changed[:, 17] = bos
    effect = np.abs(logits(changed) - base)
    assert effect[:, 4:17].max() > 1e-6, "the change must be seen inside its own document"
    if config.model.documents == "isolated":
        assert effect[:, 17:].max() == 0.0
    else:
        assert effect[:, 17:].max() > 1e-6


# Random tokens: nothing can be learned, so a loss below ln V can only come from seeing the target.

VOCAB, SEQ, ROWS, STEPS = 32, 24, 16, 300


def plant_leak(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every query see one key past itself."""
    ops = module(backend, "ops")
    honest = ops.causal_mask

    def leaky(queries, keys, documents):
        mask = honest(queries, keys + 1, None)[:, :-1]  # aligned bottom-right: one key more for everyone
        return mask if documents is None else mask[None, None]

    monkeypatch.setattr(ops, "causal_mask", leaky)


def last_loss(backend: str, config: RunConfig) -> float:
    """Return the mean loss of the last 50 of 300 steps on fresh uniform tokens."""
    model = dataclasses.replace(config.model, vocab=VOCAB, layers=2)
    rates: dict[str, Any] = {f"lr_{group}": 3e-3 for group in ("embed", "matrix", "vector")}
    rates["matrix_rule"] = "adamw"  # no rule can learn what is not there; Muon's small products would double the time
    train = dataclasses.replace(config.train, batch=ROWS, seq=SEQ, steps=STEPS, warmdown=0.0, **rates)
    config = dataclasses.replace(config, model=model, train=train)
    # Packed documents need no mask in the fast form; the exact one always asks for it, so that a leak can be planted.
    made, losses = engine(backend, config, dtype="float32", exact=model.documents == "packed"), []
    for step in range(STEPS):
        rows = tokens(f"random/{step}", ROWS, SEQ + 1, VOCAB, model.bos, documents=False)
        plan = schedule.plan(step, schedule.progress_by_steps(step, train), train)
        losses.append(made.train_step(Batch(rows[:, :-1], rows[:, 1:]), plan))
    return float(np.mean([p.result().loss for p in losses[-50:]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", minis())
def test_random_tokens_stay_at_their_entropy(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = last_loss(backend, mini(name))
    # `tokens` moves BOS onto its neighbour, so the entropy is a little below ln V.
    p = 2 / VOCAB
    entropy = -(VOCAB - 2) / VOCAB * math.log(1 / VOCAB) - p * math.log(p)
    assert entropy - 0.02 < honest < math.log(VOCAB) + 0.1
    plant_leak(backend, monkeypatch)
    assert last_loss(backend, mini(name)) < math.log(VOCAB) - 0.1, "the control: a leak must show"
