"""The loss of consistency (train.consistency), and looking ahead without layers. Budget: 15 s."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.tolerances import P2_FLOAT64, P3_FLOAT64, relative_rms
from core.config import ConfigError, ModelConfig, RunConfig, changed
from core.data.batch import Batch
from core.engine.protocol import Arrays
from core.model.context import Training
from core.training import schedule
from shared_tests import oracle
from shared_tests.support.harness import (
    BACKENDS,
    batches,
    engine,
    mini,
    to_device,
    to_numpy,
    tokens,
    working_weights,
)
from shared_tests.support.one_layer import ONE_LAYER, check_reading_back

SKC = {"blocks": ("skc",), "koopman.dim": 8, "skc.capsules": 3, "skc.block": 4}
MODELS: dict[str, dict[str, Any]] = {
    "skc": SKC,
    "bank": {"bank.at": "head", "bank.heads": 2, "bank.capsules": 3, "skc.block": 4, "head.softcap": None},
    "ahead": {**SKC, "skc.heads": 2, "skc.ahead": True, "bank.at": "both", "layers": 2, "bank.ahead": True},
    "packed": {**SKC, "documents": "packed", "bank.at": "head", "bank.heads": 2, "repeat_layers": (0,)},
}
"""Stores of layers, of the bank, of both, one after the other; with the coupling and with a step that foresees."""


def of(name: str, **train: Any) -> RunConfig:
    """Return a run of a small model with capsules."""
    config = mini("debug")
    settings = {"consistency": 0.3, "z_loss": 0.0, "seq": 23, **train}
    model = changed(ModelConfig(), ONE_LAYER | {"embedding.dim": None} | MODELS[name])
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **settings))


def rows_of(config: RunConfig, rows: int = 3) -> Batch:
    """Return rows of documents; the first row is one document, the last row has one in every block."""
    ids = tokens("consistency", rows, config.train.seq + 1, config.model.vocab, config.model.bos)
    ids[0][ids[0] == config.model.bos] = 5
    ids[-1, ::3] = config.model.bos
    return Batch(ids[:, :-1], ids[:, 1:])


def by_the_oracle(config: RunConfig, weights: Arrays, batch: Batch) -> tuple[float, list[np.ndarray]]:
    """Return the training loss, and what each store puts out for each row."""
    model, w = config.model, {name: np.asarray(value, np.float64) for name, value in weights.items()}
    text = oracle.text_of(model, batch.tokens)._replace(auxiliary=frozenset(["consistency"]))
    stream = oracle.PARTS["embedding"](model, w, text)
    for stage in model.stages(True):
        stream = oracle.PARTS[stage.part](model, oracle.below(w, f"{stage.name}."), stream, stage, text)
    z = oracle.PARTS["head"](model, w, stream)
    z = z - z.max(-1, keepdims=True)
    nll = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, batch.targets[..., None], -1)[..., 0]
    stores = [loss for _, loss in stream.auxiliary]
    return float(nll.mean() + config.train.consistency * sum(loss.mean() for loss in stores)), stores


@pytest.mark.pair
@pytest.mark.parametrize("name", MODELS)
def test_the_training_loss_equals_the_oracle_and_gradients_agree(name: str) -> None:
    config = of(name)
    weights, batch, found = working_weights(config.model, 5.0), rows_of(config), {}
    expected, stores = by_the_oracle(config, weights, batch)
    assert len(stores) == {"skc": 1, "bank": 1, "ahead": 4, "packed": 3}[name]
    for loss in stores:
        assert loss[:-1].all() and loss[-1:].any() == (name == "packed"), "a row of openings alone foresees nothing"
    for backend in BACKENDS:
        loss, found[backend] = engine(backend, config, weights, dtype="float64").gradients(batch)
        assert loss == pytest.approx(expected, rel=1e-12)
    ours, theirs = found.values()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert relative_rms(value, theirs[key]) <= P2_FLOAT64, key
        assert value.any(), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", [3, 5])
def test_rows_may_be_shorter_than_two_blocks(seq: int, backend: str) -> None:
    """No run has such rows, but text that is learned while it is scored may."""
    config = of("ahead")
    weights, batch = working_weights(config.model, 5.0), rows_of(config)
    batch = Batch(batch.tokens[:, :seq], batch.targets[:, :seq])
    expected, stores = by_the_oracle(config, weights, batch)
    loss, grads = engine(backend, config, weights, dtype="float64").gradients(batch)
    assert loss == pytest.approx(expected, rel=1e-12) and not any(store.any() for store in stores)
    assert all(np.isfinite(value).all() for value in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_that_of_what_foresees(backend: str) -> None:
    """By finite differences, of weights that no target depends on; what is only a target learns nothing from it."""
    config = of("bank")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, documents="packed"))
    weights, batch = working_weights(config.model, 5.0), rows_of(config)
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    batch.tokens[batch.tokens == 7] = 8
    batch.tokens[:, 17] = 7  # of the last whole block: it is stored there, and nothing is foreseen from it
    made = engine(backend, config, weights, dtype="float64")
    _, grads = made.gradients(batch)
    name = "bank_head.capsules.couple_out"
    sides = [
        by_the_oracle(config, weights | {name: weights[name] + step}, batch)[0]
        for step in (1e-6 * weights[name], -1e-6 * weights[name])
    ]
    assert np.sum(grads[name] * weights[name]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, consistency=0.0))
    _, without = engine(backend, plain, weights, dtype="float64").gradients(batch)
    more = np.abs(grads["embed.weight"] - without["embed.weight"]).max(axis=1)
    assert more[7] < 1e-15 and more[np.unique(batch.tokens[0, :16])].min() > 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_logits_keep_every_bit(dtype: str, backend: str) -> None:
    """Of the model of a step's pass, with and without the loss."""
    config = of("ahead")
    made: Any = engine(backend, config, working_weights(config.model, 5.0), dtype=dtype)
    ids, found = rows_of(config).tokens, []
    for names in ((), ("consistency",)):
        record: dict[str, Any] = {}
        given = (made._scored(), to_device(backend, ids, dtype), made._constants(ids.shape[1]))
        made._forward(*given, record=record, training=Training(frozenset(names)))
        assert [name for name, _ in record.pop("auxiliary")] == list(names) * 4
        assert record.pop("routes", ()) == ()
        found.append({key: to_numpy(value).tobytes() for key, value in record.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_make_the_mean_of_the_step(backend: str) -> None:
    """Rows have different numbers of blocks that count: the mean of rows is what adds up."""
    ends = []
    for rows in (4, 3, 1):  # 3: the last micro-batch has one row
        config = of("ahead", batch=4, micro_batch=4 if rows == 3 else rows)
        made: Any = engine(backend, config, working_weights(config.model, 5.0), dtype="float64")
        made._rows = lambda seq, rows=rows: rows
        result = made.train_step(rows_of(config, 4), schedule.plan(0, 0.5, config.train)).result()
        ends.append({**made.params(), **made.optimizer(), "norm": np.array(result.grad_norm)})
    for other in ends[1:]:
        assert all(relative_rms(other[name], value) <= P3_FLOAT64 for name, value in ends[0].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_capsules_become_easier_to_foresee(backend: str) -> None:
    config = of("ahead", consistency=1.0, batch=3, lr_vector=0.03)
    made, batch, found = engine(backend, config, dtype="float32"), batches(config, 1)[0], []
    for step in range(13):
        if step in (0, 12):
            found.append(sum(loss.mean() for loss in by_the_oracle(config, made.params(), batch)[1]))
        assert made.train_step(batch, schedule.plan(step, 0.5, config.train)).result().finite
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bank_looks_ahead_alone(backend: str) -> None:
    """Without recurrent layers there is no other Walsh-Hadamard matrix; heads are wider than a layer's would be."""
    check_reading_back(ONE_LAYER | {"bank.at": "head", "bank.heads": 1, "bank.ahead": True}, "bank/ahead", backend)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.skc.ahead": True}, "model.skc.ahead=True: no layer has capsules"),
        ({"model.bank.ahead": True}, "model.bank.ahead=True: model.bank.at=none has no store"),
        (
            {"model.bank.at": "head", "model.bank.ahead": True, "model.dim": 48},
            r"model.bank.ahead: model.dim / model.bank.heads=12: expected a power of two",
        ),
        ({"train.consistency": 0.1}, "train.consistency=0.1: no part stores capsules; name skc layers, take a bank"),
        ({"train.consistency": -0.1}, "train.consistency=-0.1: expected a number from 0 up"),
        (
            {"train.consistency": 0.1, "model.bank.at": "head", "train.seq_stages": (16,), "train.seq_until": (0.5,)},
            "train.consistency=0.1: rows of 16 tokens hold no two blocks of model.skc.block=16 tokens",
        ),
    ],
)
def test_what_nothing_uses_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(presets.get("debug").config, changes)
