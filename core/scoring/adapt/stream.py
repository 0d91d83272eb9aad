"""One stream: the text is scored chunk by chunk, and after each the weights learn from it, on all ranks at once."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from core.adapt_config import AdaptConfig
from core.engine.adapting import AdaptStep
from core.engine.protocol import Scoring
from core.engine.ranks import Alone, Ranks
from core.scoring.adapt.weights import LooseWeights, rate
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.predictions import Predictor, ScoredReader, View, predict_together, view_of
from core.scoring.session import Progress, Watch
from core.scoring.snapshots import Snapshot, Snapshots
from core.scoring.windows import Windows


class StreamChunk(NamedTuple):
    """What is scored with one version of the weights, and what they learn from then."""

    number: int
    """From 0, over all texts."""
    windows: Windows
    """Those whose first scored target is in the chunk, in order; there may be none."""
    places: np.ndarray
    """(count,) int64: the positions of its targets, all scored by then; none: the last chunk of its text."""
    lr: float
    anew: bool
    """Whether a text begins: the weights are put back before its windows are scored."""


def stream_chunks(windows: Windows, adapt: AdaptConfig, document_starts: np.ndarray) -> Iterator[StreamChunk]:
    """Yield the chunks of a text that is cut into `windows`, in their order.

    The text is what the windows score, one after the other; with eval.adapt.reset=document each document is one, and
    no window reads two.
    """
    documents = np.zeros_like(windows.start)
    if adapt.reset == "document":
        documents = np.searchsorted(document_starts, windows.start + windows.first, "right")
    cuts = np.flatnonzero(np.diff(documents)) + 1
    number = 0
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(documents)], strict=True):
        for chunk in _chunks(windows.take(slice(begin, end)), adapt):
            yield chunk._replace(number=number)
            number += 1


def learn_chunk(weights: LooseWeights, ledger: Ledger, chunk: StreamChunk, adapt: AdaptConfig) -> None:
    """Let weights learn from a chunk of which every target is scored."""
    ranges = ledger.scored(chunk.places)
    step = AdaptStep("sgd", chunk.lr, decay=adapt.decay, momentum=adapt.momentum, clip=adapt.clip)
    for _ in range(adapt.steps if ranges else 0):
        weights.train(ranges, step)


def _chunks(windows: Windows, adapt: AdaptConfig) -> Iterator[StreamChunk]:
    """Yield the chunks of one text."""
    counts = windows.length - windows.first
    ends = np.cumsum(counts)
    total, size = int(ends[-1]), adapt.chunk
    own = (ends - counts) // size
    chunks = -(-total // size)
    for chunk in range(chunks):
        first, last = np.searchsorted(own, [chunk, chunk + 1])
        begin, end = (chunk * size, (chunk + 1) * size) if chunk + 1 < chunks else (0, 0)
        a, b = np.searchsorted(ends, [begin, end], "right")
        places = targets_of(windows.take(slice(a, b + 1)))[begin - int(ends[a] - counts[a]) :][: end - begin]
        lr = rate(adapt.lr, adapt.schedule, chunk, chunks)
        yield StreamChunk(chunk, windows.take(slice(first, last)), places, lr, chunk == 0)


def targets_of(windows: Windows) -> np.ndarray:
    """Return the positions of the targets that windows score, (targets,) int64."""
    counts = windows.length - windows.first
    begins = windows.start + windows.first + 1 - (np.cumsum(counts) - counts)
    return np.repeat(begins, counts) + np.arange(counts.sum())


class StreamPass:
    """A scoring pass in which whole weights learn from each chunk once it is in the ledger.

    Ranks score their shares of a chunk's windows, tell each other, and learn from it together. An evaluation that goes
    on takes the weights from their last copy, repeats the chunks that came after it, and must find what the ledger
    holds of them.
    """

    def __init__(
        self,
        engine: Any,
        evaluation: Evaluation,
        ledger: Ledger,
        predictors: Sequence[Predictor] = (),
        watch: Watch | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._engine, self._evaluation, self._ledger = engine, evaluation, ledger
        self._watch, self._ranks, self._config = watch, ranks or Alone(), evaluation.config
        self._predictors = list(predictors)
        judged = bool(predictors) or watch is not None  # by passes of eval.batch, for any number of ranks
        scoring = Scoring() if judged else getattr(engine, "scoring", Scoring())
        windows = -(-self._config.adapt.chunk // evaluation.stride)
        share = windows if judged else -(-windows // self._ranks.world)
        self._rows = min(scoring.rows(self._config.batch, self._config.seq), share)
        self._most, self._number, self._snapshots = scoring.ahead, 0, Snapshots(ledger)
        written = np.flatnonzero(ledger.entries["order"]) + 1
        self._enter(written if self._ranks.rank == 0 else written[:0])
        for predictor in self._predictors:
            predictor.start(ScoredReader(evaluation.split, ledger))
        self._weights = LooseWeights(engine, evaluation.split, ledger, self._config.seq, evaluation.loose)

    @property
    def skipped(self) -> int:
        """Updates that were left out, since loss or gradients were not finite."""
        return self._weights.skipped

    def run(self, progress: Progress | None = None) -> None:
        """Score every target that is not in the ledger, and repeat what has to be."""
        windows, weights, done = self._evaluation.rows(), self._weights, 0
        try:
            first = self._restored()
            for chunk in stream_chunks(windows, self._config.adapt, self._evaluation.split.document_starts):
                done += len(chunk.windows.start)
                if chunk.number < first:
                    self._check_written(chunk.windows)
                else:
                    if chunk.anew:
                        weights.reset()
                    self._score(chunk.windows)
                    learn_chunk(weights, self._ledger, chunk, self._config.adapt)
                    self._copy(chunk.number + 1)
                if progress is not None:
                    progress(done, len(windows.start))
        finally:
            weights.close()
        self._snapshots.remove()

    def _check_written(self, windows: Windows) -> None:
        """Raise LedgerError unless the ledger holds what windows score, which the copy of the weights is behind."""
        if not self._ledger.written(targets_of(windows)).all():
            raise self._snapshots.refused("is of another ledger")

    def _score(self, windows: Windows) -> None:
        """Score this rank's share of windows, enter what all ranks have scored, and let predictors learn from it."""
        turns = [windows.take(slice(i, i + self._rows)) for i in range(0, len(windows.start), self._rows)]
        under_way, passes = [], [(np.empty(0, np.int64), np.empty(0), np.empty(0))]
        for turn in turns[self._ranks.rank :: self._ranks.world]:
            under_way.append(self._started(*view_of(self._evaluation.split, turn, self._rows, self._config.seq)))
            if len(under_way) >= self._most:
                passes.append(self._read(*under_way.pop(0)))
            if self._watch is not None:  # an audit, of one rank, counts writes as passes
                self._enter(*passes[-1][:2])
        passes += [self._read(*one) for one in under_way]
        positions, nats, moments = map(np.concatenate, zip(*passes, strict=True))
        if self._watch is None:
            self._enter(positions, nats)
        sums = [of_rank.reshape(-1, 2) for of_rank in self._ranks.gather(moments)] if self._predictors else []
        for number, turn in enumerate(turns if self._predictors else []):
            own = sums[number % len(sums)][number // len(sums)]
            for predictor in self._predictors:
                predictor.learn(self._ledger.scored(targets_of(turn)), None if np.isnan(own).any() else own)

    def _started(self, view: View, targets: np.ndarray) -> tuple[View, np.ndarray, Any, Any, bool]:
        """Start a forward pass; return what waits for its nats, its tape if there is more to ask, and if it is seen."""
        self._number += 1
        engine, tape = self._engine, None
        watched = self._watch is not None and self._watch.wants(self._number)
        if self._predictors or watched:
            prediction = predict_together(self._predictors, view, self._evaluation.split.tokenizer.vocab)
            tape = engine.predicted(view.tokens, targets, prediction)
            wait = tape.nll
        elif self._most > 1:
            wait = engine.nll_later(view.tokens, targets, True)
        else:
            wait = functools.partial(engine.nll, view.tokens, targets)
        return view, targets, wait, tape, watched

    def _read(
        self, view: View, targets: np.ndarray, wait: Any, tape: Any, watched: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the positions of a forward pass' targets that count, their nats, and its moments (2,)."""
        nats = np.asarray(wait(), np.float64)
        if nats.shape != targets.shape:
            raise LedgerError(f"the engine returned nll of shape {nats.shape}, expected {targets.shape}")
        if watched:
            assert self._watch is not None
            self._watch.see(view, targets, nats, tape.logprobs())
        moments = tape.moments() if self._predictors else None
        return view.positions[view.kept], nats[view.kept], np.full(2, np.nan) if moments is None else moments

    def _enter(self, positions: np.ndarray, nats: np.ndarray | None = None) -> None:
        """Enter what all ranks have scored into every rank's ledger, or hold it against what is there.

        Without `nats` it is what this rank's ledger holds at `positions`.
        """
        entries = self._ledger.entries[positions - 1]
        fresh = nats is not None
        version = np.full(len(positions), self._weights.version) if fresh else entries["version"]
        costs = entries["nats"] if nats is None else nats
        sides = positions, np.ascontiguousarray(costs), np.ascontiguousarray(version, np.int64)
        for where, cost, marks in zip(*map(self._ranks.gather, sides), strict=True):
            old = self._ledger.written(where)
            if fresh:
                self._ledger.confirm(where[old], cost[old], marks[old])
            self._ledger.write(where[~old], cost[~old], marks[~old])

    def _copy(self, chunks: int) -> None:
        """Copy weights and predictors now and then."""
        if self._snapshots.due:
            weights = self._weights
            sides = {"weights": weights.state(), **{str(i): one.state() for i, one in enumerate(self._predictors)}}
            place = {"chunks": chunks, "version": weights.version, "moved": int(weights.moved)}
            self._snapshots.write(Snapshot(place, sides))

    def _restored(self) -> int:
        """Take what rank 0's last copy holds and return the number of the chunk to go on with."""
        copy = self._snapshots.read(self._ranks, "chunks", "version", "moved")
        if copy is None:
            return 0
        try:
            self._weights.load(copy.sides.get("weights", {}), copy.place["version"], bool(copy.place["moved"]))
            for i, predictor in enumerate(self._predictors):
                predictor.load(copy.sides.get(str(i), {}))
        except (ValueError, KeyError) as error:
            raise self._snapshots.refused(str(error)) from error
        return copy.place["chunks"]
