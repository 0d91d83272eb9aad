"""No output sees the future: flip, prefix and random-token tests on every preset's mini. Budget: 90 s."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.tolerances import CAUSAL
from core.config import ModelConfig, RunConfig, TrainConfig
from core.data.batch import Batch
from core.model.config import KINDS
from core.model.tables import walsh
from core.training import schedule
from shared_tests.support.harness import (
    BACKENDS,
    EVERYTHING,
    HYBRID,
    engine,
    mini,
    minis,
    module,
    reader,
    shortened,
    to_device,
    tokens,
    working_weights,
)

pytestmark = pytest.mark.pair
LENGTHS = (1, 15, 16, 17, 31, 64)
BEYOND = (100, 257)
"""Lengths beyond a chunk of the recurrence, which only the model with everything on is held to."""
FLIPS = 32
"""Flips that are looked at in one forward pass, a row each."""


FORMS: dict[str, dict] = {"exact": {"dtype": "float64"}, "fast": {"dtype": "float32", "exact": False}}
"""The forms that carry the proofs, and those that train."""


def logits_of(backend: str, config: RunConfig, form: str = "exact") -> Callable[[np.ndarray], np.ndarray]:
    """Return the logits of an engine of its own, in which a leak may be planted."""
    return engine(backend, config, working_weights(config.model, 2.0), **FORMS[form]).logits


def flip_leaks(logits: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, bos: int, vocab: int) -> float:
    """Return the largest change before position s over all s, when token s becomes another token or BOS.

    Every flip is a row of a batch, held against the same row of an unchanged batch of that shape. Of rows longer than
    64, every fifth position and the last are flipped.
    """
    count, seq = rows.shape
    at = range(seq) if seq <= 64 else [*range(0, seq, 5), seq - 1]
    flips = [[(s, new) for s in at for new in ((row[s] + 7) % vocab, bos) if new != row[s]] for row in rows]
    each = min(FLIPS // count, max(map(len, flips)))  # rows of a batch for each of `rows`
    unchanged = np.repeat(rows, each, axis=0)
    base, worst = logits(unchanged), 0.0
    for first in range(0, max(map(len, flips)), each):
        changed = unchanged.copy()
        part = [(i * each + r, *f) for i, own in enumerate(flips) for r, f in enumerate(own[first : first + each])]
        for r, s, new in part:
            changed[r, s] = new
        effect = np.abs(logits(changed) - base).max(axis=-1)
        worst = max(worst, *(float(effect[r, :s].max(initial=0.0)) for r, s, _ in part))
    return worst


def documents_at_block_edges(seq: int, model: ModelConfig) -> np.ndarray:
    """Return rows whose documents begin at the first and last place of a block, in the middle, and twice in a row."""
    rows = tokens(f"edges/{seq}", 2, seq, model.vocab, model.bos, documents=False)
    block = model.skc.block
    for places in ((block, 2 * block - 1, 2 * block), (0, 1, block + block // 2, 3 * block - 1)):
        row = 0 if places[0] else 1
        rows[row, [p for p in places if p < seq]] = model.bos
    return rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shortened(minis()))
def test_flip(name: str, backend: str, form: str) -> None:
    config = mini(name)
    logits = reader(backend, config, 2.0, **FORMS[form]).logits
    for seq in LENGTHS:
        rows = tokens(f"flip/{seq}", 2, seq, config.model.vocab, config.model.bos)
        if name not in presets.PRESETS or name.startswith("skc"):
            rows = documents_at_block_edges(seq, config.model)
        assert flip_leaks(logits, rows, config.model.bos, config.model.vocab) == 0.0, seq


@pytest.mark.long
@pytest.mark.parametrize("seq", BEYOND)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_flip_in_long_rows(backend: str, form: str, seq: int) -> None:
    model = mini(EVERYTHING).model
    logits = reader(backend, mini(EVERYTHING), 2.0, **FORMS[form]).logits
    assert flip_leaks(logits, documents_at_block_edges(seq, model), model.bos, model.vocab) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_flip_test_catches_a_mask_that_is_one_off(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_leak(backend, monkeypatch)
    config = mini("tiny")
    rows = tokens("flip/17", 2, 17, config.model.vocab, config.model.bos, documents=False)
    assert flip_leaks(logits_of(backend, config), rows, config.model.bos, config.model.vocab) > 1e-3


# The leaks of the original system (docs/causality.md), planted in ours.


def transform_over_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Walsh-Hadamard transform over the steps of every block, the open one included."""
    ops, join = module(backend, "ops"), module("mlx", "ops").mx.concatenate if backend == "mlx" else None
    honest, matrix = ops.short_conv, walsh(8)

    def leaky(x, weight, documents):
        y = honest(x, weight, documents)
        rows, seq, width = y.shape
        whole = seq // 8 * 8
        mixed = to_device(backend, matrix, "float64") @ y[:, :whole].reshape(rows, -1, 8, width)
        parts = [mixed.reshape(rows, whole, width), y[:, whole:]]
        return join(parts, axis=1) if join else module("cuda", "ops").torch.cat(parts, dim=1)

    monkeypatch.setattr(ops, "short_conv", leaky)


def softmax_over_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing that is normalised over the positions of the row."""
    capsules = module(backend, "parts.capsules").Capsules
    honest = capsules.route

    def leaky(self, logits, which, context):
        share = honest(self, logits, which, context)
        return share / share.sum(1, keepdims=True)

    monkeypatch.setattr(capsules, "route", leaky)


def pooled_sketch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the whole row, added to every position."""
    koopman = module(backend, "parts.koopman").Koopman
    honest = koopman.gated
    monkeypatch.setattr(koopman, "gated", lambda self, x, z: honest(self, x, z) + 0.1 * x.mean(1, keepdims=True))


def length_of_the_row(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing that is divided by the length of the row: no flip shows it, since flips keep the length."""
    capsules = module(backend, "parts.capsules").Capsules
    honest = capsules.route
    monkeypatch.setattr(capsules, "route", lambda self, x, w, c: honest(self, x, w, c) * (1 + x.shape[1]) ** -0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plant", [transform_over_time, softmax_over_time, pooled_sketch, length_of_the_row])
def test_the_leaks_of_the_original_are_caught(plant: Callable, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini("skc_ablate")
    rows = tokens("flip/40", 1, 40, config.model.vocab, config.model.bos, documents=False)
    assert flip_leaks(logits_of(backend, config), rows, config.model.bos, config.model.vocab) == 0.0
    plant(backend, monkeypatch)
    logits = logits_of(backend, config)
    flips = flip_leaks(logits, rows, config.model.bos, config.model.vocab)
    prefix = float(np.abs(logits(rows[:, :33]) - logits(rows)[:, :33]).max())
    if plant is length_of_the_row:
        assert flips == 0.0 and prefix > 1e-5
    else:
        assert flips > 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shortened(minis()))
def test_prefix(name: str, backend: str) -> None:
    config = mini(name)
    logits = reader(backend, config, 2.0, **FORMS["exact"]).logits
    lengths = (*LENGTHS, *(BEYOND if name == EVERYTHING else ()))
    rows = tokens("prefix", 2, max(lengths) + 7, config.model.vocab, config.model.bos)
    whole = logits(rows)
    for k in lengths:
        assert np.abs(logits(rows[:, :k]) - whole[:, :k]).max() <= CAUSAL, k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shortened(minis()))
def test_documents_are_isolated_exactly_where_the_preset_says_so(name: str, backend: str) -> None:
    config = mini(name)
    bos, vocab = config.model.bos, config.model.vocab
    logits = reader(backend, config, 2.0, **FORMS["exact"]).logits
    rows = tokens("isolation", 2, 40, vocab, bos, documents=False)
    rows[:, 17] = bos
    base = logits(rows)
    changed = rows.copy()
    changed[:, [3, 14, 15, 16]] = (changed[:, [3, 14, 15, 16]] + 5) % vocab
    changed[changed == bos] = (bos + 1) % vocab
    changed[:, 17] = bos
    effect = np.abs(logits(changed) - base)
    assert effect[:, 4:17].max() > 1e-6, "the change must be seen inside its own document"
    if config.model.documents == "isolated":
        assert effect[:, 17:].max() == 0.0
    else:
        assert effect[:, 17:].max() > 1e-6


# Random tokens: nothing can be learned, so a loss below ln V can only come from seeing the target.

VOCAB, SEQ, ROWS, STEPS = 32, 17, 8, 100


def plant_leak(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every query see one key past itself, and every short convolution start one position ahead."""
    ops = module(backend, "ops")
    honest, convolve = ops.causal_mask, ops.short_conv

    def ahead(x, weight, documents):
        y = convolve(x, weight, documents)
        last = x.shape[1] - y.shape[1]  # the value of position t lies at t + last
        return y[:, :1] * 0 + convolve(x[:, list(range(1, x.shape[1])) + [-1]], weight, documents * 0) if last else y

    monkeypatch.setattr(ops, "short_conv", ahead)

    def leaky(queries, keys, documents):
        mask = honest(queries, keys + 1, None)[:, :-1]  # aligned bottom-right: one key more for everyone
        return mask if documents is None else honest(queries, keys, documents) | mask

    monkeypatch.setattr(ops, "causal_mask", leaky)


def last_loss(backend: str, config: RunConfig, enough: float = -math.inf) -> float:
    """Return the mean loss of the last 50 of STEPS steps on fresh uniform tokens, or of the first 25 below `enough`."""
    model = dataclasses.replace(config.model, vocab=VOCAB)
    kinds = tuple(dict.fromkeys(map(model.kind, range(model.layers))))
    fewer: dict[str, Any] = {"layers": max(2, len(kinds)), "blocks": kinds}
    if model.repeat_layers or model.shared_blocks:
        fewer = {"repeat_layers": model.repeat_layers[:1]}
    attending = dataclasses.replace(model.attention, xsa_layers=None)  # all that there are
    model = dataclasses.replace(model, attention=attending, **fewer)
    rates: dict[str, Any] = {f"lr_{group}": 3e-3 for group in ("embed", "matrix", "vector")}
    # No rule can learn what is not there, and no form of the weights knows a token: AdamW on the weights as they are
    # takes half the time of Muon on stored ones (the flips are looked at with stored ones).
    rates |= {"matrix_rule": "adamw", "quantise": "never", "warmdown": 0.0}
    train = TrainConfig(batch=ROWS, seq=SEQ, steps=STEPS, repeat_from=config.train.repeat_from, **rates)
    config = dataclasses.replace(config, model=model, train=train)
    # Packed documents need no mask in the fast form; the exact one always asks for it, so that a leak can be planted.
    made, losses = engine(backend, config, dtype="float32", exact=model.documents == "packed"), []
    for step in range(STEPS):
        if step % 25 == 24:
            recent = float(np.mean([p.result().loss for p in losses[-25:]]))
            if recent < enough:
                return recent
        rows = tokens(f"random/{step}", ROWS, SEQ + 1, VOCAB, model.bos, documents=False)
        plan = schedule.plan(step, schedule.progress_by_steps(step, train), train)
        losses.append(made.train_step(Batch(rows[:, :-1], rows[:, 1:]), plan))
    return float(np.mean([p.result().loss for p in losses[-50:]]))


@pytest.mark.parametrize(
    "kind, backend",
    [
        pytest.param(kind, backend, marks=pytest.mark.long if number % 2 else ())  # one engine each in the short run
        for i, kind in enumerate(KINDS)
        for number, backend in enumerate(BACKENDS, i)
    ],
)
def test_random_tokens_teach_no_layer_kind(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini("debug")
    one_kind = dataclasses.replace(config, model=dataclasses.replace(config.model, blocks=(kind,)))
    random_tokens_stay_at_their_entropy(one_kind, backend, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in minis() if name != HYBRID])  # `everything` has its kinds
def test_random_tokens_teach_no_mini(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random_tokens_stay_at_their_entropy(mini(name), backend, monkeypatch)


def random_tokens_stay_at_their_entropy(config: RunConfig, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a model on random tokens as it is, and then with a planted leak, which must show."""
    honest = last_loss(backend, config)
    # `tokens` moves BOS onto its neighbour, so the entropy is a little below ln V.
    p = 2 / VOCAB
    entropy = -(VOCAB - 2) / VOCAB * math.log(1 / VOCAB) - p * math.log(p)
    assert entropy - 0.02 < honest < math.log(VOCAB) + 0.1
    plant_leak(backend, monkeypatch)
    limit = math.log(VOCAB) - 0.1
    assert last_loss(backend, config, limit) < limit, "the control: a leak must show"
