"""Plug-ins on both backends, and those that train: score first, then train, and put the weights back. Budget: 25 s."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from core.check import tolerances
from core.data.batch import Batch
from core.engine.protocol import Engine, micro_batches
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError, Scored
from core.scoring.plugins import Learner, Plugin, Temperature, log_softmax
from core.scoring.score import score
from core.training import schedule
from shared_tests.support.harness import BACKENDS
from shared_tests.support.known_scores import VOCAB, make_dataset
from shared_tests.support.plugin_examples import (
    CUTS,
    LENGTHS,
    SHORT,
    TRAIN,
    Adaptation,
    Killed,
    Resets,
    config,
    fresh,
    held,
    run,
    small,
)
from shared_tests.support.zoo_honest import HonestCache

ADAPTED_FLOAT64 = 1e-8
"""Nats of targets after adaptation, backend against backend (measured: 2e-15)."""


HELP: dict[str, Callable[[], Sequence[Any]]] = {
    "nothing": list,
    "temperature": lambda: [Temperature()],
    "cache": lambda: [HonestCache()],
    "both": lambda: [Temperature(), HonestCache()],
}


@pytest.mark.pair
@pytest.mark.parametrize(
    "windows, helper", [("plain", h) for h in HELP] + [(w, h) for w in list(CUTS)[1:] for h in ("nothing", "both")]
)
def test_backends_agree(windows: str, helper: str) -> None:
    dataset, changes = make_dataset(SHORT), CUTS[windows][0]
    run_config = small("hybrid" if windows == "stateful" else "debug")
    for dtype in ("float64", "float32"):
        (ours, mine), (theirs, other) = (
            run(fresh(backend, run_config, dtype), dataset, HELP[helper](), **changes) for backend in BACKENDS
        )
        assert (mine["order"] == other["order"]).all()
        if dtype == "float64":
            assert np.abs(mine["nats"] - other["nats"]).max() <= 1e-10
            gap = abs(run(fresh("cuda", run_config, dtype), dataset, [], **changes)[0].nats - ours.nats)
            assert (gap > 1e-4) == (helper != "nothing"), "what is compared must matter"
        assert abs(ours.bpb - theirs.bpb) <= tolerances.P5_BPB


@pytest.mark.pair
@pytest.mark.parametrize("name", ["debug", "skc_mac"])
def test_backends_adapt_alike(name: str) -> None:
    dataset, found = make_dataset(LENGTHS), []
    for backend in BACKENDS:
        adaptation = Adaptation(quantise=name == "skc_mac")
        found.append(run(fresh(backend, small(name), "float64"), dataset, [adaptation])[1])
        assert adaptation.steps == 5
    assert (found[0]["version"] == found[1]["version"]).all()
    without = run(fresh("cuda", small(name), "float64"), dataset, [])[1]
    assert np.abs(found[0]["nats"] - without["nats"]).max() > 1e-2
    assert np.abs(found[0]["nats"] - found[1]["nats"]).max() <= ADAPTED_FLOAT64


def trained(backend: str, name: str, **changes: Any) -> Engine:
    """Return an engine with an optimizer that has been at work, and averages that are not the weights."""
    base = small(name)
    model = fresh(backend, dataclasses.replace(base, train=dataclasses.replace(base.train, **changes)))
    row = make_dataset(LENGTHS).val.read(0, 65)[None]
    for step in range(2):
        plan = dataclasses.replace(schedule.plan(step, 0.5, TRAIN), average=0.9 * step, quantise=model.quantise)
        assert model.train_step(Batch(row[:, :-1], row[:, 1:]), plan).result().finite
    return model


@pytest.mark.pair
@pytest.mark.parametrize("end", ["ends", "raises"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_gets_its_weights_back(backend: str, end: str) -> None:
    dataset = make_dataset(LENGTHS)
    for model in (trained(backend, "skc_mac"), trained(backend, "debug", average_from=0.1)):
        before, during = held(model), []

        def progress(done: int, total: int, model: Engine = model, during: list = during) -> None:
            if done > total / 2:
                during.append(model.params())
                if end == "raises":
                    raise Killed

        plugins: list[Plugin] = [Adaptation(quantise=not model.quantise)]
        try:
            score(model, Evaluation(dataset.val, config(), plugins=True), progress=progress, plugins=plugins)
            assert end == "ends"
        except Killed:
            assert end == "raises"
        assert any(before[f"params/{name}"] != value.tobytes() for name, value in during[0].items())
        assert held(model) == before


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_rows_than_a_micro_batch_are_learned(backend: str) -> None:
    """8 rows of 64 fit a micro-batch: one row of 32 is less, and one of 128 more tokens than any row of training."""
    dataset = make_dataset(LENGTHS)
    for length, batch in ((32, 2), (128, 8)):
        plugin = Adaptation(length)
        _, entries = run(fresh(backend, small("debug")), dataset, [plugin], batch=batch)
        assert plugin.steps > 0 and entries["version"].max() == plugin.steps
    three = Batch(np.zeros((3, 4), np.int32), np.zeros((3, 4), np.int32))
    assert micro_batches(three, 2, 1) == ([slice(0, 2), slice(2, 3)], [1.0, 0.5], 1.5)
    assert micro_batches(three._replace(total=8), 8, 3) == ([slice(0, 3)], [1.0], 8 / 3)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adaptation_is_scored_first_and_trained_then(backend: str) -> None:
    """The ledger holds, to the bit, what this loop gives; each version of the weights is that of its updates."""
    dataset = make_dataset(LENGTHS)
    _, entries = run(fresh(backend, small("debug")), dataset, [Adaptation()])
    model, text = fresh(backend, small("debug")), dataset.val.tokens
    updates = 0
    for order, at in enumerate(range(0, len(text) - 1, 64), 1):
        inputs, targets = np.zeros((4, 16), np.int32), np.zeros((4, 16), np.int32)
        count = min(64, len(text) - 1 - at)
        inputs.flat[:count], targets.flat[:count] = text[at : at + count], text[at + 1 : at + count + 1]
        nats = -np.take_along_axis(log_softmax(model.logits(inputs)), targets[..., None], -1).astype(np.float64)
        found = entries[at : at + count]
        assert (found["nats"] == nats.flat[:count]).all(), order
        assert (found["order"] == order).all() and (found["version"] == updates).all()
        if count == 64:
            row = text[None, at : at + 65]
            model.train_step(Batch(row[:, :-1], row[:, 1:]), schedule.plan(updates, 0.5, TRAIN)).result()
            updates += 1
    assert updates == 5


def test_an_adaptation_begins_with_an_optimizer_that_knows_nothing() -> None:
    """Momentum of the training run is in no artifact: a score may not come from it."""
    dataset, model = make_dataset(LENGTHS), trained("cuda", "debug")
    decoded = fresh("cuda", small("debug")).params()
    model.load_params(decoded)
    assert any(value.any() for value in model.optimizer().values())
    _, found = run(model, dataset, [Adaptation()])
    _, expected = run(fresh("cuda", small("debug")), dataset, [Adaptation()])
    assert found.tobytes() == expected.tobytes()


def test_reset_is_a_new_version_of_the_weights_of_the_start() -> None:
    dataset = make_dataset(LENGTHS)
    plugin = Resets()
    _, entries = run(fresh("cuda", small("debug")), dataset, [plugin])
    by_order = [int(entries["version"][entries["order"] == i][0]) for i in range(1, 7)]
    assert by_order == [0, 1, 3, 5, 7, 9] and plugin.steps == 5
    model = fresh("cuda", small("debug"))
    row, last = dataset.val.read(256, 321)[None], dataset.val.read(320, len(dataset.val))
    model.train_step(Batch(row[:, :-1], row[:, 1:]), schedule.plan(4, 0.5, TRAIN)).result()
    inputs = np.zeros((4, 16), np.int32)
    inputs.flat[: len(last) - 1] = last[:-1]
    scored = log_softmax(model.logits(inputs)).reshape(64, VOCAB)[np.arange(len(last) - 1), last[1:]]
    assert (entries["nats"][320:] == -scored.astype(np.float64)).all()


def learner_of(lengths: list[int]) -> tuple[Learner, list[Scored], Ledger, Engine]:
    """Return a learner, the ranges of one scored text of 64 and one of 32 targets, their ledger and the engine."""
    split, model = make_dataset(lengths).val, fresh("cuda", small("debug"))
    book = Ledger(len(split))
    ranges = [*book.write(np.arange(1, 65), np.ones(64), 0), *book.write(np.arange(65, 97), np.ones(32), 0)]
    return Learner(model, split, book), ranges, book, model


def test_training_takes_scored_ranges_of_one_length_only() -> None:
    learner, (long, short), book, model = learner_of(LENGTHS)
    plan, before = schedule.plan(0, 0.5, TRAIN), held(model)
    forged = copy.copy(long)
    object.__setattr__(forged, "start", 97)
    object.__setattr__(forged, "stop", 161)
    early = copy.copy(long)
    object.__setattr__(early, "stop", 66)
    (foreign,) = Ledger(len(book.entries) + 1).write(np.arange(101, 165), np.ones(64), 0)
    for fake in (forged, early, foreign):
        for ranges in ([fake], [long, fake]):
            with pytest.raises(LedgerError, match="were not scored") as refused:
                learner.train(ranges, plan)
            assert refused.value.rule == "D9"
    with pytest.raises(LedgerError, match="by hand") as refused:
        Scored(97, 161, 0, 1)
    assert refused.value.rule == "D9"
    for ranges in ([long, short], []):
        with pytest.raises(LedgerError, match="one length"):
            learner.train(ranges, plan)
    assert learner.version == 0 and held(model) == before
    assert learner.train([long], plan).finite and learner.version == 1 and held(model) != before
