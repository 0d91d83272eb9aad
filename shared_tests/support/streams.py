"""What tests of streams and phases share: settings, one pass, and an engine that writes down what it is to learn."""

from typing import Any

import numpy as np

from core.config import AdaptConfig, EvalConfig
from core.data.batch import Batch
from core.engine.adapting import AdaptStep
from core.engine.protocol import Arrays, StepResult
from core.engine.ranks import Alone
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.score import score_text
from shared_tests.support.known_scores import make_dataset

DOCUMENTS = [5, 40, 1, 17, 16, 2, 33, 20]
"""Lengths in tokens, with BOS: 134 in all."""
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"windows": "plain"},
    "sliding": {"windows": "sliding", "stride": 5},
    "documents": {"windows": "documents", "stride": 5},
    "reset": {"windows": "documents", "stride": 5, "reset": "document"},
    "drawn": {"windows": "documents", "documents": 5},
}
"""Every way to cut a stream."""


def stream(names: tuple[str, ...] = ("embed.weight",), **changes: Any) -> Evaluation:
    """Return the evaluation of the known documents as one stream that the weights `names` learn from."""
    adapt = {"kind": "sgd", "chunk": 24, "steps": 2, "lr": 0.1, "clip": 1.0, "schedule": "cosine", "reset": "never"}
    adapt |= {name: changes.pop(name) for name in list(changes) if hasattr(AdaptConfig, name) and name != "documents"}
    documents = changes.pop("documents", None)
    config = EvalConfig(adapt=AdaptConfig(**adapt), **{"seq": 12, "batch": 3, **changes})
    return Evaluation(make_dataset(DOCUMENTS).val, config, documents, adapts=True, loose=names)


def run(engine: Any, evaluation: Evaluation, ledger: Ledger | None = None, plugins: Any = ()) -> np.ndarray:
    """Score and return the ledger's entries."""
    ledger = ledger or Ledger(len(evaluation.split))
    score_text(engine, evaluation, ledger, plugins=plugins)
    return ledger.entries.copy()


class Recorder:
    """An engine that learns nothing and writes down what it is asked for; every target costs one nat."""

    def __init__(self) -> None:
        self.ranks = Alone()
        self.calls: list[str] = []
        self.batches: list[Batch] = []
        self.steps: list[AdaptStep] = []

    def weights(self) -> Arrays:
        """Return a weight that never moves."""
        return {"embed.weight": np.zeros(3)}

    def loosen(self, names: tuple[str, ...]) -> None:
        """Take note."""
        self.calls.append("loosen")

    def tighten(self) -> None:
        """Take note."""
        self.calls.append("tighten")

    def forget_momenta(self) -> None:
        """Take note."""
        self.calls.append("forget")

    def descend(self, batch: Batch, step: AdaptStep) -> StepResult:
        """Take note."""
        self.calls.append("descend")
        self.batches.append(batch)
        self.steps.append(step)
        return StepResult(1.0, 1.0, True)

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return one nat for each target."""
        self.calls.append("nll")
        return np.ones(tokens.shape)
