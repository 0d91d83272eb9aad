"""Cheats by adaptation, each planted into core's code or into the engine: nothing but a change of code makes them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.data.batch import Batch
from core.engine.adapting import AdaptStep
from core.scoring.adapt import session
from core.scoring.adapt.documents import documents_of
from core.scoring.adapt.phases import phases_of
from core.scoring.adapt.rows import Rows
from core.scoring.counts import Counts
from core.scoring.predictions import Prediction, Temperature, View
from shared_tests.support import zoo_predictions
from shared_tests.support.adapting_numpy import AdaptingEngine, FakeTape

STRONG = AdaptStep("sgd", 0.5, momentum=0.0, clip=1.0)


class Learner(AdaptingEngine):
    """The numpy engine: its site is `embed`, its two tables learn, whatever the settings name of a real model."""

    def adapters(self, spec: Any, rows: int, slot: int, a: Any = None) -> Any:
        return super().adapters(spec._replace(sites=("embed",)), rows, slot, a)

    def predicted(self, tokens: np.ndarray, targets: np.ndarray, prediction: Any, state: Any = None) -> FakeTape:
        return self.adapted(None, tokens, targets, prediction, state)

    def loosen(self, names: Any) -> None:
        self.loose = True
        super().loosen(("table", "w"))

    def tighten(self) -> None:
        self.loose = False
        super().tighten()


class Neighbours(Learner):
    """Every row learns from the mean gradient of all rows that learn."""

    def adapt(self, tape: FakeTape, shares: np.ndarray, step: AdaptStep) -> Any:
        own, rows = FakeTape.gradient, (shares != 0).any(axis=1)

        def mean(tape: FakeTape, shares: np.ndarray) -> Any:
            return {key: np.broadcast_to(g[rows].mean(0), g.shape) for key, g in own(tape, shares).items()}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeTape, "gradient", mean)
            return super().adapt(tape, shares, step)


class Impatient(Learner):
    """Its weights learn from each pass at once, before the other passes of its chunk are scored."""

    loose = False

    def predicted(self, tokens: np.ndarray, targets: np.ndarray, prediction: Any, state: Any = None) -> FakeTape:
        tape = super().predicted(tokens, targets, prediction, state)
        if self.loose:
            self.descend(Batch(tokens, targets), STRONG)
        return tape


def learns_first(patch: pytest.MonkeyPatch) -> None:
    """Rows learn from a chunk before it is scored."""
    run = Rows.run

    def early(rows: Any, chunk: Any, *given: Any) -> Any:
        tape = run(rows, chunk, *given)
        step = AdaptStep("sgd", np.full(len(rows.numbers), 0.5), momentum=0.0, clip=1.0, taken=rows._taken)
        rows._adapters = rows._engine.adapt(tape, chunk.view.kept / chunk.view.kept.shape[1], step)
        return run(rows, chunk, *given)

    patch.setattr(Rows, "run", early)


def keeps_b(patch: pytest.MonkeyPatch) -> None:
    """The adapters of a batch are those that the batch before left."""
    init, run = Rows.__init__, Rows.run
    left: list[Any] = [None, None]  # a ledger, which is kept so that no later one is taken for it, and adapters

    def kept(rows: Any, engine: Any, ledger: Any, *given: Any) -> None:
        init(rows, engine, ledger, *given)
        rows._adapters = left[1] if left[0] is ledger else rows._adapters

    def noted(rows: Any, *given: Any) -> Any:
        left[:] = rows._ledger, rows._adapters
        return run(rows, *given)

    patch.setattr(Rows, "__init__", kept)
    patch.setattr(Rows, "run", noted)


def phase_of_all(patch: pytest.MonkeyPatch) -> None:
    """A phase learns from all documents."""

    def of_all(evaluation: Any) -> Any:
        everything = len(documents_of(evaluation).targets)
        return tuple(phase._replace(documents=everything) for phase in phases_of(evaluation))

    patch.setattr(session, "phases_of", of_all)


def phase_past_the_ledger(patch: pytest.MonkeyPatch) -> None:
    """A phase learns from the documents behind its boundary, which it reads past the ledger."""

    def learn(weights: Any, ledger: Any, begins: np.ndarray, ends: np.ndarray, config: Any) -> None:
        text = weights._split.read(int(ends[-1]), len(weights._split))
        weights._engine.descend(Batch(text[None, :-1], text[None, 1:]), STRONG)

    patch.setattr(session, "learn_phase", learn)


def learns_twice(patch: pytest.MonkeyPatch) -> None:
    """Rows learn from a chunk and, with the adapters that this made, from the same targets again."""
    learn = Rows.learn

    def twice(rows: Any, *given: Any) -> None:
        chunk, state = rows._chunk, rows._state
        learn(rows, *given)
        rows._chunk, rows._state = chunk, state
        rows._tape = rows._adapted(None)
        learn(rows, *given)

    patch.setattr(Rows, "learn", twice)


def scores_the_tail_again(patch: pytest.MonkeyPatch) -> None:
    """Rows learn from the last chunk of their document too, and score it again."""
    enter = session.Adaptation._enter

    def again(adaptation: Any, rows: Any, chunk: Any, tape: Any, watched: bool) -> Any:
        scored = enter(adaptation, rows, chunk, tape, watched)
        if chunk.last[0]:
            rows.learn(scored, adaptation._adapt, np.full(len(rows.numbers), 0.1))
            row, column = np.nonzero(chunk.view.kept)
            nats = np.asarray(rows.run(chunk, None, None).nll())[row, column]
            adaptation._ledger.write(chunk.view.positions[row, column], nats, rows.version[row], rows.numbers[row])
        return scored

    patch.setattr(session.Adaptation, "_enter", again)


def rate_of_the_document(patch: pytest.MonkeyPatch) -> None:
    """The learning rate falls towards the end of each document, before that is read."""
    learn, batch_of = Rows.learn, session.Adaptation._batch
    ends: dict[str, Any] = {}

    def batch(adaptation: Any, slot: int, documents: Any, progress: Any) -> None:
        ends.update(chunks=-(-documents.targets // adaptation._adapt.chunk), number=0)
        batch_of(adaptation, slot, documents, progress)

    def falling(rows: Any, scored: Any, adapt: Any, rates: np.ndarray) -> None:
        rates = rates.copy()
        share = np.minimum(ends["number"] / ends["chunks"], 1.0)
        rates[: len(share)] *= (1 + np.cos(np.pi * share)) / 2
        ends["number"] += 1
        learn(rows, scored, adapt, rates)

    patch.setattr(session.Adaptation, "_batch", batch)
    patch.setattr(Rows, "learn", falling)


def tilt_reads_the_target(patch: pytest.MonkeyPatch) -> None:
    """The temperature brings a tilt towards the next inputs of the windows."""
    prediction, tilt = Temperature.prediction, zoo_predictions.TargetTilt().prediction
    patch.setattr(Temperature, "prediction", lambda self, view, given: tilt(view, prediction(self, view, given)))


def counts_before_the_write(patch: pytest.MonkeyPatch) -> None:
    """The table of hints has the inputs of a pass before they are in the ledger."""
    prediction = Counts.prediction

    def sooner(counts: Any, view: View, given: Prediction) -> Prediction:
        counts.table.count([(row, 1) for row in view.tokens])
        return prediction(counts, view, given)

    patch.setattr(Counts, "prediction", sooner)


Plant = Callable[[pytest.MonkeyPatch], None]


def settings(base: Any, parts: dict[str, Any]) -> Any:
    """Return settings of evaluation that learn much from little; `adapt` and `phases` replace some of theirs."""
    adapt: dict[str, Any] = {"kind": "lora", "chunk": 16, "documents": 2, "lr": 0.05, "rank": 2, "sites": ("head",)}
    if parts.get("adapt", {}).get("kind") == "sgd":
        adapt = {"chunk": 128, "lr": 0.5, "clip": 1.0}
    own = {"windows": "documents", "round": 1, **parts}
    own["adapt"] = dataclasses.replace(type(base.adapt)(), **(adapt | parts.get("adapt", {})))
    own["phases"] = dataclasses.replace(type(base.phases)(), **parts.get("phases", {}))
    return dataclasses.replace(base, **own)
