"""What tests of streams and phases share: a text that is scored and learned from, and an engine that learns nothing."""

from typing import Any

import numpy as np

from core.adapt.settings import AdaptConfig
from core.adapt.stream import learn_chunk, stream_chunks
from core.adapt.weights import LooseWeights
from core.data.batch import Batch
from core.engine.protocol import AdaptStep, Arrays, StepResult
from core.engine.ranks import Alone, share
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.windows import Windows


def score_windows(engine: Any, evaluation: Evaluation, ledger: Ledger, windows: Windows, version: int) -> None:
    """Score windows, each rank its share, and enter all of them in every rank's ledger."""
    mine = share(len(windows.start), engine.ranks)
    positions, nats = [np.empty(0, np.int64)], [np.empty(0)]
    for start, length, first in zip(*(side.tolist() for side in windows.take(mine)), strict=True):
        text = evaluation.split.read(start, start + length + 1)[None]
        nats.append(engine.nll(text[:, :-1], text[:, 1:])[0, first:].astype(np.float64))
        positions.append(np.arange(start + first + 1, start + length + 1))
    sides = [engine.ranks.gather(np.concatenate(side)) for side in (positions, nats)]
    ledger.write(*(np.concatenate(side) for side in sides), version)


def run_stream(engine: Any, evaluation: Evaluation, adapt: AdaptConfig, names: tuple[str, ...]) -> Ledger:
    """Return the ledger of a text that the weights `names` learned from while it was scored."""
    split, ledger = evaluation.split, Ledger(len(evaluation.split))
    weights = LooseWeights(engine, split, ledger, evaluation.config.seq, names)
    try:
        for chunk in stream_chunks(evaluation.rows(), adapt, split.document_starts):
            if chunk.anew:
                weights.reset()
            score_windows(engine, evaluation, ledger, chunk.windows, weights.version)
            learn_chunk(weights, ledger, chunk, adapt)
    finally:
        weights.close()
    return ledger


class Recorder:
    """An engine that learns nothing and writes down what it is to learn from; every target costs one nat."""

    ranks = Alone()

    def __init__(self) -> None:
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
        return np.ones(tokens.shape)
