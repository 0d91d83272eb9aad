"""What adaptation and plug-ins gain: the same documents scored without and with them, and the paired difference."""

import dataclasses
import time
from typing import Any, NamedTuple

import numpy as np

from core.config import EvalConfig, RunConfig, require
from core.console import Console
from core.data.dataset import Split
from core.engine.protocol import Engine
from core.engine.ranks import only_rank_0
from core.scoring.accounting import bits_per_byte, count_bytes, ratio_error
from core.scoring.adapt.phases import phases_of
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.score import Score, score
from core.scoring.tally import Tally

ANY_NUMBER = 1 << 53
"""Documents that there could be. The error is that of drawing others like them: it stays where the text has no more."""


class ScoreGain(NamedTuple):
    """A sample of documents, each scored twice."""

    before: Score
    after: Score
    difference: float
    """Bits per byte of `after` less those of `before`: below 0 is a gain."""
    error: float | None
    """Standard error of the difference; None where one document says nothing about spread."""
    seconds: tuple[float, float]
    """What both took, by the wall clock."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        scores = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {**scores, "difference": self.difference, "error": self.error, "seconds": list(self.seconds)}


def without(config: EvalConfig) -> EvalConfig:
    """Return the settings with nothing that learns, and with windows of the same contexts.

    A document's adapters are updated after each chunk, so that what a chunk is predicted from ends with the chunk.
    """
    plain = config.plain()
    chunked = config.adapt.kind == "lora" and config.windows == "documents"
    return dataclasses.replace(plain, stride=config.adapt.chunk) if chunked else plain


def check_gain(config: EvalConfig, documents: int) -> None:
    """Raise ConfigError where nothing can be gained, or no error could be given."""
    require(
        config.learns,
        "nothing adapts and nothing changes predictions, so that nothing can be gained: choose eval.adapt.kind or "
        "eval.plugins",
    )
    require(documents >= 2, f"a gain on {documents} documents: expected at least 2, whose spread says how sure it is")


def measure_gain(engine: Engine, split: Split, run: RunConfig, documents: int, say: Console) -> ScoreGain:
    """Score so many documents without and with what `run.eval` lets learn; ConfigError as `check_gain`."""
    check_gain(run.eval, documents)
    phases_of(Evaluation.of(split, run, documents, plugins=True))  # now, not after the first of two scores
    scores, costs, seconds = [], [], []
    for label, config in (("scoring without", without(run.eval)), ("scoring with", run.eval)):
        evaluation = Evaluation.of(split, dataclasses.replace(run, eval=config), documents, plugins=True)
        ledger, began = Ledger(len(split)), time.perf_counter()
        progress = say.progress(label, Tally(ledger, split))
        scores.append(score(engine, evaluation, ledger, progress=progress, ranks=engine.ranks, say=say))
        seconds.append(time.perf_counter() - began)
        costs.append(np.array(only_rank_0(engine.ranks, lambda e=evaluation, book=ledger: nats_of_documents(e, book))))
    counted = count_bytes(split, *evaluation.ranges(), evaluation.drawn).counted
    difference, error = paired_difference(costs[0], costs[1], counted)
    return ScoreGain(scores[0], scores[1], difference, error, (seconds[0], seconds[1]))


def paired_difference(before: np.ndarray, after: np.ndarray, counted: np.ndarray) -> tuple[float, float | None]:
    """Return (difference, standard error) in bits per byte of documents, given their nats and bytes, (documents,)."""
    gained = after - before
    error = ratio_error(gained, counted, ANY_NUMBER)
    return bits_per_byte(float(gained.sum()), int(counted.sum())), None if error is None else bits_per_byte(error, 1)


def nats_of_documents(evaluation: Evaluation, ledger: Ledger) -> list[float]:
    """Return what each document cost."""
    return [ledger.total(a + 1, b + 1) for a, b in zip(*(side.tolist() for side in evaluation.ranges()), strict=True)]
