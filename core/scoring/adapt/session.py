"""Scoring with adapters: every chunk of a document is scored, entered, and only then learned from, in rounds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.engine.protocol import Arrays
from core.engine.ranks import Alone, Ranks, agree
from core.model.adapters import AdapterSpec
from core.scoring.adapt.documents import DocumentChunk, Documents, chunk_of, chunks_in, documents_of, rounds_of
from core.scoring.adapt.phases import learn_phase, phases_of
from core.scoring.adapt.rows import Rows
from core.scoring.adapt.weights import LooseWeights, rate
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError, Scored
from core.scoring.predictions import Prediction, Predictor, ScoredReader, predict_together
from core.scoring.session import Progress, Watch
from core.scoring.snapshots import Snapshot, Snapshots

COLUMNS = {"nats": "<f8", "version": "<i8", "row": "<i8"}
"""Fields of the ledger that ranks tell each other, and their types on the way."""
OFTEN = 2000
"""Passes from which on it pays to compile for them, as in plain scoring."""


class Adaptation:
    """A scoring pass with adapters.

    Documents are scored in rounds of eval.round batches, and what all share changes between rounds alone. No adapter is
    stored: an evaluation that goes on repeats the documents that were open from their start, and must find what the
    ledger holds of them. Where a round does not begin like every other (warm A, predictors, phases), it goes on from a
    copy of that, which is taken at the end of a round.
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
        self._watch, self._ranks, self._predictors = watch, ranks or Alone(), list(predictors)
        self._config, self._adapt = evaluation.config, evaluation.config.adapt
        self._spec = AdapterSpec(self._adapt.rank, self._adapt.alpha, evaluation.sites, self._config.seed)
        documents = documents_of(evaluation)
        self._rows = min(self._adapt.documents, len(documents.begin))
        self._rounds = rounds_of(documents, self._rows, self._config.round)
        self._chunks = int(chunks_in(documents.targets, self._adapt.chunk).sum())
        longest = (int(chunks_in(batch.targets, self._adapt.chunk).max()) for one in self._rounds for batch in one)
        self._often = sum(longest) >= OFTEN
        self._phases = {phase.round: phase.documents for phase in phases_of(evaluation)}
        self._documents, self._weights = documents, None
        shared = self._adapt.warm_a or bool(self._predictors) or bool(self._phases)
        self._alike = not shared and self._adapt.reset == "document"
        """Whether every round begins alike, so that a batch needs nothing of those before it."""
        self._stream: Rows | None = None
        """The adapters that are never reset."""
        self._warm: dict[int, Arrays] = {}
        self._moments: list[np.ndarray] = []
        """What each own pass of this round says of the temperature, (2,) each."""
        self._number = self._done = 0
        self._snapshots = Snapshots(ledger)
        for predictor in self._predictors:
            predictor.start(ScoredReader(evaluation.split, ledger))
        self._share_ledger()

    @property
    def skipped(self) -> int:
        """Updates of weights that were left out, since loss or gradients were not finite."""
        return self._weights.skipped if self._weights is not None else 0

    def run(self, progress: Progress | None = None) -> None:
        """Score every target that is not in the ledger; repeat what has to be."""
        try:
            first = self._restored()
            for number, batches in enumerate(self._rounds):
                if number < first or (self._alike and all(map(self._finished, batches))):
                    self._done += sum(map(self._length, batches))
                    continue
                for slot, batch in enumerate(batches):
                    if self._owner(slot) != self._ranks.rank:
                        continue
                    if self._alike and self._finished(batch):
                        self._done += self._length(batch)
                    else:
                        self._batch(slot, batch, progress)
                self._end_round(number, batches)
        finally:
            if self._weights is not None:
                self._weights.close()
        if self._ledger.complete():
            self._snapshots.remove()

    def _owner(self, slot: int) -> int:
        """Return the rank that scores a slot; what is never reset is one stream, which rank 0 reads alone."""
        return slot % self._ranks.world if self._adapt.reset == "document" else 0

    def _finished(self, batch: Documents) -> bool:
        """Whether the ledger holds all of a batch."""
        pairs = zip(batch.begin.tolist(), batch.targets.tolist(), strict=True)
        return all(self._ledger.written(np.arange(begin + 1, begin + count + 1)).all() for begin, count in pairs)

    def _length(self, batch: Documents) -> int:
        return int(chunks_in(batch.targets, self._adapt.chunk).sum())

    def _batch(self, slot: int, batch: Documents, progress: Progress | None) -> None:
        """Score a batch chunk by chunk; each row learns from a chunk before its next one is scored."""
        rows, engine = self._adapters(slot, batch), self._engine
        state = engine.start(self._rows) if self._evaluation.carries else None
        chunks = chunks_in(batch.targets, self._adapt.chunk)
        for number in range(int(chunks.max())):
            chunk = chunk_of(self._evaluation.split, batch, self._rows, number, self._config)
            self._number += 1
            watched = self._watch is not None and self._watch.wants(self._number)
            tape = rows.run(chunk, self._prediction(chunk, watched), state, self._often)
            scored = self._enter(rows, chunk, tape, watched)
            following = number + 1 < chunks.max()
            after = engine.commit(tape, chunk.used) if state is not None and following else None
            rows.learn(self._taught(rows, chunk, scored), self._adapt, np.full(self._rows, self._rate()))
            state = after
            self._done += int(chunk.view.kept.any(axis=1).sum())
            if progress is not None:
                progress(self._done, self._chunks)
        if self._adapt.warm_a:
            self._warm[slot] = rows.a()

    def _adapters(self, slot: int, batch: Documents) -> Rows:
        """Return the adapters of a batch: new ones, numbered by its documents, or those that are never reset."""
        given = self._engine, self._ledger, self._spec
        if self._adapt.reset == "never":
            text = Documents(*(np.array([n], np.int64) for n in (0, len(self._evaluation.split) - 1, 0)))
            self._stream = self._stream or Rows(*given, text, 1, 0)
            return self._stream
        return Rows(*given, batch, self._rows, slot, self._warm.get(slot))

    def _taught(self, rows: Rows, chunk: DocumentChunk, scored: Sequence[Scored]) -> list[Scored]:
        """Return what is worth learning from: after the last chunk of a document nothing is scored any more."""
        if self._adapt.reset == "never":
            return list(scored) if self._done + 1 < self._chunks else []
        ended = set(rows.numbers[chunk.last].tolist())
        return [one for one in scored if one.row not in ended]

    def _rate(self) -> float:
        """Return the learning rate after the chunk that was scored last."""
        return rate(self._adapt.lr, self._adapt.schedule, self._done, self._chunks)

    def _prediction(self, chunk: DocumentChunk, watched: bool) -> Prediction | None:
        """Return how the predictors change a pass; None: not at all. Who watches asks for the whole distribution."""
        if self._predictors:
            return predict_together(self._predictors, chunk.view, self._evaluation.split.tokenizer.vocab)
        return Prediction() if watched else None

    def _enter(self, rows: Rows, chunk: DocumentChunk, tape: Any, watched: bool) -> tuple[Scored, ...]:
        """Enter what a pass gave, or hold it against what is entered, and return the ranges."""
        view, nats = chunk.view, np.asarray(tape.nll(), np.float64)
        if nats.shape != chunk.targets.shape:
            raise LedgerError(f"the engine returned nll of shape {nats.shape}, expected {chunk.targets.shape}")
        if watched:
            assert self._watch is not None
            self._watch.see(view, chunk.targets, nats, tape.logprobs())
        if self._predictors:
            moments = tape.moments()
            self._moments.append(np.full(2, np.nan) if moments is None else moments)
        row, column = np.nonzero(view.kept)
        positions, costs = view.positions[row, column], nats[row, column]
        version, number = rows.version[row], rows.numbers[row]
        old = self._ledger.written(positions)
        known = self._ledger.confirm(positions[old], costs[old], version[old], row=number[old])
        new = ~old
        return (*known, *self._ledger.write(positions[new], costs[new], version[new], number[new]))

    def _end_round(self, number: int, batches: list[Documents]) -> None:
        """Tell the other ranks what this one scored, and take a copy of what the next round begins with."""
        if self._ranks.world > 1:
            own = [batch for slot, batch in enumerate(batches) if self._owner(slot) == self._ranks.rank]
            self._exchange(_targets(own))
            self._done = sum(self._length(batch) for batches in self._rounds[: number + 1] for batch in batches)
        self._teach(batches)
        documents = self._phases.get(number + 1)
        if documents is not None:
            self._phase(self._documents.take(slice(documents)))
        due = self._snapshots.due or (documents is not None and self._snapshots.path is not None)
        if not self._alike and self._adapt.reset == "document" and agree(self._ranks, due):
            self._copy(number + 1)

    def _phase(self, documents: Documents) -> None:
        """Let the weights learn from the first documents, on all ranks together; the next adapters are new ones."""
        weights, config = self._loose(), self._config.phases
        learn_phase(weights, self._ledger, documents.begin, documents.end, config)

    def _loose(self) -> LooseWeights:
        """Return the weights that learn in phases, which keep their first values until then."""
        if self._weights is None:
            given = self._evaluation.split, self._ledger, self._config.seq, self._evaluation.loose
            self._weights = LooseWeights(self._engine, *given)
        return self._weights

    def _teach(self, batches: list[Documents]) -> None:
        """Let the predictors learn from a round, batch by batch and pass by pass: alike for any number of ranks."""
        if not self._predictors:
            return
        own, self._moments = np.concatenate([np.empty(0), *self._moments]), []
        moments = [iter(of_rank.reshape(-1, 2)) for of_rank in self._ranks.gather(own)]
        for slot, batch in enumerate(batches):
            for number in range(int(chunks_in(batch.targets, self._adapt.chunk).max())):
                sums = next(moments[self._owner(slot)])
                ranges = self._ledger.scored(_targets_of_chunk(batch, number, self._adapt.chunk))
                for predictor in self._predictors:
                    predictor.learn(ranges, None if np.isnan(sums).any() else sums)

    def _exchange(self, positions: np.ndarray) -> None:
        """Enter what every rank has at its `positions` into every rank's ledger."""
        entries = self._ledger.entries[positions - 1]
        places = self._ranks.gather(positions)
        sides = [self._ranks.gather(np.ascontiguousarray(entries[name], kind)) for name, kind in COLUMNS.items()]
        for there, nats, version, row in zip(places, *sides, strict=True):
            new = ~self._ledger.written(there)
            self._ledger.write(there[new], nats[new], version[new], row[new])

    def _share_ledger(self) -> None:
        """Give every rank what rank 0 has from an evaluation that was killed."""
        if self._ranks.world > 1:
            written = np.flatnonzero(self._ledger.entries["order"]) + 1
            self._exchange(written if self._ranks.rank == 0 else written[:0])

    def _copy(self, rounds: int) -> None:
        """Copy what the next round begins with; every rank calls this."""
        sides = {f"a{slot}": sites for slot, sites in self._everyones_a().items()}
        sides |= {f"predictor{i}": predictor.state() for i, predictor in enumerate(self._predictors)}
        version = 0
        if self._weights is not None:
            sides["loose"], version = self._weights.state(), self._weights.version
        self._snapshots.write(Snapshot({"rounds": rounds, "version": version}, sides))

    def _everyones_a(self) -> dict[int, Arrays]:
        """Return the A of every slot, which its rank alone has; every rank calls this."""
        if self._ranks.world == 1:
            return self._warm
        kinds = agree(self._ranks, {site: (a.shape, a.dtype.str) for site, a in self._warm.get(0, {}).items()})
        slots = sorted(self._warm)
        numbers = self._ranks.gather(np.array(slots, np.int64))
        warm: dict[int, Arrays] = {int(slot): {} for own in numbers for slot in own}
        for site, (shape, kind) in kinds.items():
            own = [np.asarray(self._warm[slot][site]).reshape(-1) for slot in slots]
            # A round may have fewer slots than ranks: nothing is of the same type then, too.
            flat = self._ranks.gather(np.concatenate([np.empty(0, kind), *own]))
            for theirs, values in zip(numbers, flat, strict=True):
                for slot, a in zip(theirs.tolist(), values.reshape(len(theirs), *shape), strict=True):
                    warm[slot][site] = a
        return warm

    def _restored(self) -> int:
        """Take back the last copy and return the round to go on with, from 0."""
        copy = self._snapshots.read(self._ranks, "rounds", "version")
        if copy is None:
            return 0
        rounds = copy.place["rounds"]
        ended = [batch for batches in self._rounds[:rounds] for batch in batches]
        if not 0 < rounds <= len(self._rounds) or not all(map(self._finished, ended)):
            raise self._snapshots.refused("is of another ledger")
        try:
            for side, state in copy.sides.items():
                if side == "loose":
                    self._loose().load(state, copy.place["version"])
                elif side.startswith("predictor"):
                    self._predictors[int(side.removeprefix("predictor"))].load(state)
                else:
                    self._warm[int(side.removeprefix("a"))] = state
        except (ValueError, KeyError, IndexError) as error:
            raise self._snapshots.refused(str(error)) from error
        return rounds


def _targets_of_chunk(batch: Documents, number: int, chunk: int) -> np.ndarray:
    """Return the positions of the targets of a pass, row by row."""
    first, end = number * chunk, np.minimum((number + 1) * chunk, batch.targets)
    pairs = zip(batch.begin.tolist(), end.tolist(), strict=True)
    return np.concatenate([np.arange(begin + first + 1, begin + max(first, stop) + 1) for begin, stop in pairs])


def _targets(batches: Sequence[Documents]) -> np.ndarray:
    """Return the positions of all targets of batches."""
    ranges = [np.arange(b + 1, b + n + 1) for one in batches for b, n in zip(one.begin, one.targets, strict=True)]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)
