"""Further heads (train.mtp_heads): their loss, that they are scaffolding, and what they leave alone. Budget: 15 s."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.cuda import optim
from core import presets
from core.check.tolerances import P2_FLOAT64, P3_FLOAT64, relative_rms
from core.config import ConfigError, ModelConfig, RunConfig, TrainConfig, changed
from core.data.batch import Batch
from core.engine.fitting import needed
from core.engine.optimizer_state import exported
from core.engine.protocol import Arrays
from core.engine.ranks import buckets, updated_by
from core.engine.scaffolding import scaffolding, standing, trained_table
from core.model.params import ParamBank, count, param_table, start_values
from core.training import schedule
from core.training.run import Run
from shared_tests import oracle
from shared_tests.reference.ops import linear, rms_norm
from shared_tests.support.harness import (
    BACKENDS,
    batches,
    draw,
    engine,
    gradients,
    mini,
    module,
    to_device,
    tokens,
    working_weights,
)

MODELS: dict[str, dict[str, Any]] = {
    "isolated": {"embedding.dim": None},
    "packed": {"embedding.dim": None, "documents": "packed", "head.softcap": None},
    "factored": {"embedding.dim": 24, "head.bias": True},
}
HEADS = ["mtp.1.weight", "mtp.2.weight", "mtp.3.weight"]


def of(name: str = "isolated", **train: Any) -> RunConfig:
    """Return a run of a small model with three further heads."""
    base = mini("debug")
    settings = {"mtp_heads": 3, "mtp_weight": 0.3, "z_loss": 0.0, **train}
    model = changed(base.model, {"layers": 1, "vocab": 61, **MODELS[name]})
    return dataclasses.replace(base, model=model, train=dataclasses.replace(base.train, **settings))


def weights_of(config: RunConfig) -> Arrays:
    """Return working weights of the model and of its further heads."""
    heads = {name: draw(name, *row.shape) for name, row in scaffolding(config.model, config.train).items()}
    return working_weights(config.model, 3.0) | {name: value.astype(np.float32) for name, value in heads.items()}


def crossed(logits: np.ndarray, target: int, cap: float | None) -> float:
    """Return -log p(target) of one position's logits before the cap."""
    z = logits if cap is None else cap * np.tanh(logits / cap)
    return float(np.log(np.sum(np.exp(z - z.max()))) + z.max() - z[target])


def further(model: ModelConfig, hidden: np.ndarray, heads: list[np.ndarray], ids: np.ndarray) -> float:
    """Return the further loss, token by token: hidden (B, T, E), and the ids (B, T + 1) of the rows with their ends."""
    means = []
    for row, text in zip(hidden, ids, strict=True):
        for k, head in enumerate(heads, 1):
            costs = []
            for t, h in enumerate(row):
                place, crosses = t + 1 + k, False
                if place >= len(text):
                    continue
                for between in range(t + 1, place + 1):
                    crosses |= bool(text[between] == model.bos) and model.documents == "isolated"
                if not crosses:
                    costs.append(crossed(head @ h, text[place], model.head.softcap))
            means.append(sum(costs) / len(costs) if costs else 0.0)
    return sum(means) / len(means)


def objective(config: RunConfig, weights: Arrays, batch: Batch) -> float:
    """Return the training loss by the oracle."""
    model, w = config.model, {name: np.asarray(value, np.float64) for name, value in weights.items()}
    text = oracle.text_of(model, batch.tokens)
    stream = oracle.PARTS["embedding"](model, w, text)
    for stage in model.stages(True):
        stream = oracle.PARTS[stage.part](model, oracle.below(w, f"{stage.name}."), stream, stage, text)
    hidden = rms_norm(stream.x, model.norm_eps, True)
    hidden = hidden if model.embedding.dim is None else linear(hidden, w["embed_down.weight"])
    logits = oracle.PARTS["head"](model, w, stream)
    main = [crossed(z, y, None) for z, y in zip(logits.reshape(-1, model.vocab), batch.targets.ravel(), strict=True)]
    ids = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    heads = [w[name] for name in HEADS]
    return float(np.mean(main)) + config.train.mtp_weight * further(model, hidden, heads, ids)


def rows_of(config: RunConfig, name: str, rows: int = 3, seq: int = 23) -> Batch:
    """Return rows of documents, of which the last row has no target for any further head."""
    ids = tokens(f"further/{name}", rows, seq + 1, config.model.vocab, config.model.bos)
    ids[-1, ::2] = config.model.bos
    return Batch(ids[:, :-1], ids[:, 1:])


@pytest.mark.pair
@pytest.mark.parametrize("name", MODELS)
def test_the_training_loss_equals_the_oracle_and_gradients_agree(name: str) -> None:
    config = of(name)
    weights, batch, found = weights_of(config), rows_of(config, name), {}
    for backend in BACKENDS:
        loss, found[backend] = engine(backend, config, weights, dtype="float64").gradients(batch)
        assert loss == pytest.approx(objective(config, weights, batch), rel=1e-12)
    ours, theirs = found.values()
    assert list(ours) == list(theirs) == [*param_table(config.model), *HEADS]
    for key, value in ours.items():
        assert relative_rms(value, theirs[key]) <= P2_FLOAT64, key
    assert all(value.any() for value in ours.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_shorter_than_heads_look_ahead(backend: str) -> None:
    """The third head has no target in a row of two tokens: no run has such rows, but text that is learned later may."""
    config = of("packed")
    weights, batch = weights_of(config), rows_of(config, "short", 2, 2)
    loss, grads = engine(backend, config, weights, dtype="float64").gradients(batch)
    assert loss == pytest.approx(objective(config, weights, batch), rel=1e-12)
    assert [bool(grads[name].any()) for name in HEADS] == [True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_that_of_the_loss(backend: str) -> None:
    """By finite differences, since both engines could leave out the same term."""
    config = of()
    weights, batch = weights_of(config), rows_of(config, "difference")
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    made = engine(backend, config, weights, dtype="float64")
    _, grads = made.gradients(batch)
    for name in ("mtp.2.weight", "embed.weight", "blocks.0.mlp.up.weight"):
        way, sides = draw(f"way/{name}", *weights[name].shape), []
        for sign in (1, -1):
            made.load_params(weights | {name: weights[name] + sign * 1e-6 * way})
            sides.append(made.gradients(batch)[0])
        assert np.sum(grads[name] * way) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-7), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", ["isolated", "packed"])
def test_targets_end_with_the_document_and_the_row(documents: str, backend: str) -> None:
    """A token of the next document, flipped, moves no bit of what the loss asks of the document before it."""
    config = of("isolated").model
    config = dataclasses.replace(config, documents=documents)
    ids = np.arange(2, 26, dtype=np.int32)[None] % 60 + 2
    ids[0, 12] = config.bos
    hidden, heads = draw("hidden", 1, 23, 8), [draw(name, 61, 8) for name in HEADS]

    def asked(ids: np.ndarray) -> np.ndarray:
        def loss(hidden: Any) -> Any:
            given = [to_device(backend, head, "float64") for head in heads]
            targets = to_device(backend, np.ascontiguousarray(ids[:, 1:]), "float64")
            return module(backend, "further").further_loss(hidden, given, targets, config, True)

        return gradients(backend, loss, (hidden,), [np.ones(())], "float64")["0"][0]

    before, flipped = asked(ids), ids.copy()
    flipped[0, 13] += 1
    after = asked(flipped)
    touched = np.flatnonzero(np.any(before != after, axis=1))
    if documents == "isolated":
        # 12 begins the second document, whose first further target is 14: 13 is the tied head's, and nobody's here
        assert not touched.size and not before[10:12].any() and before[9].any() and before[12].any()
        flipped[0, 14] += 1
        assert np.flatnonzero(np.any(before != asked(flipped), axis=1)).tolist() == [12]
    else:
        assert touched.tolist() == [9, 10, 11]
    assert before[21].any() and not before[22].any(), "the last token has no further target, the one before it has one"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_heads_of_no_weight_change_no_bit(rule: str, backend: str) -> None:
    """The norm that clips sees their gradients, which are zero."""
    ends, settings = [], list[dict[str, Any]](({"mtp_heads": 0}, {"mtp_heads": 3, "mtp_weight": 0.0}))
    for more in settings:
        config = of(clip=0.1, matrix_rule=rule, average_from=0.0, micro_batch=1, **more)
        made = engine(backend, config, dtype="float32")
        for step, batch in enumerate(batches(config, 3)):
            plan = schedule.plan(step, (step + 1) / 3, config.train)
            assert made.train_step(batch, plan).result().grad_norm > 0.1
        ends.append({**made.params(), **made.optimizer()})
    without, heads = ends
    assert all(heads[name].tobytes() == value.tobytes() for name, value in without.items())
    assert {name for name in heads if name not in without and heads[name].any()} == set()


def test_a_norm_of_zero_beside_the_others_changes_no_bit_of_them() -> None:
    """One zero more in torch's sum would: it adds eight values in another order than seven."""
    norm, differ = module("cuda", "update")._norm, 0
    bank = ParamBank("matrix", "float16", True, (), ())
    for size in range(1, 17):
        for turn in draw(f"norm/{size}", 20, size, 9).astype(np.float32):
            grads = {bank._replace(names=(str(i),)): torch.tensor(value) for i, value in enumerate(turn)}
            more = grads | {bank._replace(scaffold=True): torch.zeros(5)}
            assert norm(more) == norm(grads)
            differ += bool(optim.global_norm(more.values()) != norm(grads))
    assert differ, "then one sum would do"


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_make_the_mean_of_the_step(backend: str) -> None:
    """Rows have different numbers of targets: the mean of rows is what adds up."""
    ends = []
    for rows in (4, 3, 1):  # 3: the last micro-batch has one row
        config = of(batch=4, micro_batch=4 if rows == 3 else rows, seq=23)
        made: Any = engine(backend, config, weights_of(config), dtype="float64")
        made._rows = lambda seq, rows=rows: rows
        result = made.train_step(rows_of(config, "micro", 4), schedule.plan(0, 0.5, config.train)).result()
        ends.append({**made.params(), **made.optimizer(), "norm": np.array(result.grad_norm)})
    for other in ends[1:]:
        assert all(relative_rms(other[name], value) <= P3_FLOAT64 for name, value in ends[0].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_stand_while_training_only(backend: str, tmp_path: Path) -> None:
    """Trained, saved and resumed to the bit; not scored, not quantised, not averaged, not stored, not counted."""
    config = of(quantise="always", average_from=0.0, matrix_rule="muon")
    config = dataclasses.replace(config, model=changed(config.model, {"matrix_storage": "int6/row"}))
    data, table = batches(config, 4), param_table(config.model)

    def go(made: Any, steps: range) -> None:
        for step in steps:
            assert made.train_step(data[step], schedule.plan(step, (step + 1) / 4, config.train)).result().finite

    whole = engine(backend, config, dtype="float32")
    go(whole, range(4))
    assert all(whole.params()[name].any() for name in HEADS)
    assert list(whole.weights()) == list(whole.quantised()) == list(table)
    assert list(whole.params()) == [*table, *HEADS]
    assert list(exported(config.model, config.train, whole.params(), whole.optimizer())) == list(table)
    assert not [name for name in whole.optimizer() if name.startswith("mtp.") and not name.endswith(".m")]

    half, run = engine(backend, config, dtype="float32"), Run.create(tmp_path / "run", config, b"no tokenizer")
    go(half, range(2))
    run.save(half, 2, 1.0)
    resumed = engine(backend, config, dtype="float32")
    assert run.restore(resumed)[:2] == (2, 1.0)
    go(resumed, range(2, 4))
    for name, value in {**whole.params(), **whole.optimizer()}.items():
        assert {**resumed.params(), **resumed.optimizer()}[name].tobytes() == value.tobytes(), name

    stored = engine(backend, config, weights_of(config), dtype="float64")
    heads = {name: stored.params()[name] for name in HEADS}
    expected = objective(config, stored.weights() | heads, data[0])
    assert stored.quantise and stored.gradients(data[0])[0] == pytest.approx(expected, rel=1e-12), (
        "heads are not rounded"
    )

    resumed.load_params(whole.weights())
    assert not any(resumed.params()[name].any() for name in HEADS), "weights without them bring their start values"
    with pytest.raises(ValueError, match="mtp.2.weight is missing"):
        resumed.load_params({name: value for name, value in whole.params().items() if name != "mtp.2.weight"})
    with pytest.raises(ValueError, match="mtp.4.weight is not a parameter"):
        resumed.load_params({**whole.params(), "mtp.4.weight": whole.params()["mtp.3.weight"]})


def test_they_are_counted_beside_the_model() -> None:
    with_them, without = of("factored"), of("factored", mtp_heads=0)
    assert standing(with_them.model, with_them.train) == f" (+{3 * 61 * 24:,} while training)"
    assert standing(without.model, without.train) == "" and count(with_them.model) == count(without.model)
    assert needed(with_them, 4, 64, "float32") - needed(without, 4, 64, "float32") > 4 * (
        8 * 3 * 61 * 24 + 6 * 61 * 256
    )
    assert not set(start_values(with_them.model, 0)) & set(HEADS)
    muon = of("factored", matrix_rule="muon")
    parts = buckets(muon, 2)
    names = sorted(name for bucket in parts for name in bucket.names)
    assert names == sorted(trained_table(muon.model, muon.train)), "every rank's sums hold them once"
    assert sum(name in HEADS for rank in (0, 1) for name in updated_by(parts, rank)[0]) == 3
    pr550 = changed(presets.get("debug").config.model, {"vocab": 1024, "dim": 512, "embedding.dim": None})
    assert standing(pr550, TrainConfig(mtp_heads=2)) == " (+1,048,576 while training)"


@pytest.mark.parametrize(
    "given, words",
    [
        ({"mtp_heads": 8, "seq": 8}, "train.mtp_heads=8: in rows of 8 tokens the last head has no target"),
        ({"mtp_heads": 4, "seq_stages": (4,), "seq_until": (0.5,)}, "train.mtp_heads=4: in rows of 4 tokens"),
        ({"mtp_heads": -1}, "train.mtp_heads=-1: expected a number from 0 up"),
        ({"mtp_heads": 65}, "train.mtp_heads=65"),
        ({"mtp_weight": -0.1}, "train.mtp_weight=-0.1: expected a number from 0 up"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**given)
