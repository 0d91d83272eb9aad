"""Phases: at some shares of all documents the weights learn from every document that has been scored so far.

Documents are scored in rounds, and a phase comes between two of them: after the first round that holds its boundary.
It is one pass over the first documents up to the boundary, in the order of scoring, in chunks: an update on each but
the last, along a cosine.
"""

from typing import NamedTuple

import numpy as np

from core.adapt_config import PhasesConfig
from core.checks import require
from core.engine.adapting import AdaptStep
from core.scoring.adapt.documents import documents_of
from core.scoring.adapt.weights import LooseWeights, rate
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger


class PlannedPhase(NamedTuple):
    """When a phase comes, and what it learns from."""

    round: int
    """Rounds that are over by then, at least 1."""
    documents: int
    """The boundary: so many documents, the first in the order of scoring."""


def phases_of(evaluation: Evaluation) -> tuple[PlannedPhase, ...]:
    """Return the phases of an evaluation, in their order; ConfigError, as `planned_phases`, for one that cannot come.

    It scores nothing: who will score much later may ask now.
    """
    config = evaluation.config
    if not (evaluation.adapts and config.phases.at):
        return ()
    targets = documents_of(evaluation).targets
    per_round = min(config.adapt.documents, len(targets)) * config.round
    return planned_phases(config.phases, targets, per_round)


def planned_phases(config: PhasesConfig, targets: np.ndarray, per_round: int) -> tuple[PlannedPhase, ...]:
    """Return the phases of an evaluation, in their order.

    `targets` (documents,) int are those of every document in the order of scoring, of which `per_round` make a round.
    ConfigError for a phase that cannot come: before the first document, without a document behind it, in the same
    round as the phase before it, or with less text than it needs for an update.
    """
    count, phases = len(targets), []
    for at in config.at:
        documents = round(at * count)
        where = f"eval.phases.at={at:g} of {count:,} documents"
        require(documents > 0, f"{where} comes before the first of them; take a larger share, or score more documents")
        phase = PlannedPhase(-(-documents // per_round), documents)
        end = min(phase.round * per_round, count)
        require(
            end < count,
            f"{where} is document {documents:,}, which is scored in the last round of {per_round:,}: nothing would be "
            "scored after it; take a smaller share, or smaller rounds (eval.round, eval.adapt.documents)",
        )
        require(
            not phases or phases[-1].round < phase.round,
            f"{where} comes in round {phase.round}, as the phase before it does: take one of them, or smaller rounds "
            "(eval.round, eval.adapt.documents)",
        )
        text = int(targets[:documents].sum())
        require(
            text > config.chunk,
            f"{where}: the first {documents:,} have {text:,} targets, one chunk of eval.phases.chunk={config.chunk:,} "
            "at most, and the last chunk is not trained on; take a larger share, or smaller chunks",
        )
        phases.append(phase)
    return tuple(phases)


def learn_phase(
    weights: LooseWeights, ledger: Ledger, begins: np.ndarray, ends: np.ndarray, config: PhasesConfig
) -> None:
    """Let weights learn from documents, all of which are scored, with fresh momenta.

    `begins` and `ends` (documents,) int64 bound the inputs of each, in the order of scoring.
    """
    weights.forget()
    places = np.concatenate([np.arange(a + 1, b + 1) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)])
    chunks = -(-len(places) // config.chunk)
    for chunk in range(chunks - 1):
        ranges = ledger.scored(places[chunk * config.chunk : (chunk + 1) * config.chunk])
        lr = rate(config.lr, "cosine", chunk, chunks)
        for _ in range(config.epochs):
            weights.train(ranges, AdaptStep("sgd", lr, momentum=config.momentum, clip=config.clip))
    weights.check()
