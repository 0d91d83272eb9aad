"""One scoring pass: windows go through engine and plug-ins into the ledger, and only then does anything learn."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from core.engine.protocol import Scoring
from core.engine.ranks import Alone, Ranks
from core.scoring.evaluation import Evaluation
from core.scoring.exchange import Pass, gathered
from core.scoring.ledger import ROUNDING, Ledger, LedgerError, Scored
from core.scoring.plugins import Learner, Plugin, ScoredText, log_softmax
from core.scoring.predictions import Predictor, ScoredReader, View, predict_together, view_of
from core.scoring.snapshots import Snapshot, Snapshots
from core.scoring.windows import Windows, check_order, covered

EXCHANGE = 8
"""Forward passes of each rank between two exchanges of what they gave."""
Progress = Callable[[int, int], None]
"""Gets (windows done, windows in all)."""


class Watch(Protocol):
    """Looks at forward passes before they are written; changes nothing."""

    def wants(self, number: int) -> bool:
        """Whether to look at pass `number` (from 1): its whole distribution is computed then."""
        ...

    def see(self, view: View, targets: np.ndarray, nats: np.ndarray, logprobs: np.ndarray) -> None:
        """Look at the costs that will be written, (rows, seq), and the log-probabilities, (rows, seq, V)."""
        ...


class Session:
    """What a scoring pass holds together.

    With plug-ins every pass counts, in order, since it decides what they learn: an evaluation that goes on takes them
    from their last copy, repeats the passes that came after it, and checks that they give what the ledger holds.

    Those that are built in (Predictor) learn between rounds of eval.round turns, from the turns of all ranks in the
    order of the turns: so any number of ranks gives the same. The user's (Plugin) learn from each pass of one rank.
    """

    def __init__(
        self,
        engine: Any,
        evaluation: Evaluation,
        ledger: Ledger,
        plugins: Sequence[Plugin | Predictor] = (),
        watch: Watch | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks, self._held = ranks or Alone(), list[Pass]()
        self.engine, self.evaluation, self.ledger = engine, evaluation, ledger
        self.split, self.config = evaluation.split, evaluation.config
        self.plugins, self._watch = list(plugins), watch
        self.predictors = [plugin for plugin in plugins if isinstance(plugin, Predictor)]
        self._strangers = [plugin for plugin in plugins if isinstance(plugin, Plugin)]
        self._round: list[tuple[tuple[Scored, ...], np.ndarray | None]] = []
        judged = plugins or watch is not None  # by passes of eval.batch; nor is every scorer an engine
        scoring = Scoring() if judged else getattr(engine, "scoring", Scoring())
        self.rows, self._most, self._under_way = scoring.rows(self.config.batch, self.config.seq), scoring.ahead, []
        self.often = False
        self.learner = Learner(engine, self.split, ledger)
        self._before = ledger.writes
        self._number = self._done = 0
        for predictor in self.predictors:
            predictor.start(ScoredReader(self.split, ledger))
        for plugin in self._strangers:
            plugin.start(self.split.tokenizer.vocab, self.learner if plugin.kind == "adaptation" else None)
        self._snapshots = Snapshots(ledger)
        if self._ranks.world > 1:  # what rank 0 has from an evaluation that was killed
            self._take_ledger() if self.predictors else self._take_targets()
        if self.plugins:
            self._restore()

    def turns(self, rows: Windows, size: int) -> Iterator[tuple[int, Windows]]:
        """Yield (number, rows) of this rank's share of the turns: every world-th.

        What they gave goes to all ranks from time to time. With plug-ins every turn counts, also what the ledger holds.
        """
        turns = self.evaluation.turns(rows, size, None if self.plugins else self.ledger)
        world, passes = self._ranks.world, 0
        often = self.config.round if self.predictors else EXCHANGE * world
        for number, turn in enumerate(turns):
            if self.predictors:  # turns of other ranks count too
                self._number = passes
            passes += int(self.evaluation.passes(turn).max())
            if number % often % world == self._ranks.rank:
                yield number, turn
            if (number + 1) % often == 0 or number + 1 == len(turns):
                if not self.predictors:
                    self._exchange()
                elif passes > self._done:
                    self._number = passes
                    self._end_round()

    def _take_targets(self) -> None:
        """Enter the targets that rank 0's ledger holds into those of the other ranks."""
        written = np.flatnonzero(self.ledger.entries["order"]) if self._ranks.rank == 0 else np.empty(0, np.int64)
        self._held = [Pass(0, written + 1, self.ledger.entries["nats"][written])]
        self._exchange()

    def _take_ledger(self) -> None:
        """Enter what rank 0's ledger holds into those of the other ranks, write by write."""
        entries = self.ledger.entries
        written = np.flatnonzero(entries["order"]) if self._ranks.rank == 0 else np.empty(0, np.int64)
        mine = written + 1, entries["nats"][written], entries["order"][written]
        positions, nats, order = (self._ranks.gather(side)[0] for side in mine)
        if self._ranks.rank and len(positions):
            sorted_ = np.argsort(order, kind="stable")
            for part in np.split(sorted_, 1 + np.flatnonzero(np.diff(order[sorted_]))):
                self.ledger.write(positions[part], nats[part], self.learner.version)
        self._before = self.ledger.writes

    def _exchange(self) -> None:
        """Enter what every rank has scored since the last time into every rank's ledger."""
        if self._ranks.world == 1:
            return
        self.flush()
        sides = (
            np.concatenate([np.empty(0, np.int64), *(one.positions for one in self._held)]),
            np.concatenate([np.empty(0), *(one.nats for one in self._held)]),
        )
        for positions, nats in zip(*map(self._ranks.gather, sides), strict=True):
            fresh = ~self.ledger.written(positions)
            self.ledger.write(positions[fresh], nats[fresh], self.learner.version)
        self._held = []

    def _end_round(self) -> None:
        """Let the predictors learn from the round, which is in every rank's ledger then, and copy what they know."""
        held, self._held = self._held, []
        self._round += [(self._written(one), one.moments) for one in gathered(self._ranks, held)]
        for ranges, moments in self._round:
            for predictor in self.predictors:
                predictor.learn(ranges, moments)
        self._round = []
        self._copy()

    def order(self, windows: Windows, begin: int, end: int) -> Windows:
        """Return the windows in the order that the plug-ins give; LedgerError unless each target comes exactly once.

        They stay the windows that they are, and those of a document stay in the order of the text. `begin` and `end`
        bound the targets' positions.
        """
        if not self._strangers:
            return windows
        wanted, given = covered(windows, begin, end), windows
        for plugin in self._strangers:
            windows = Windows(*(np.asarray(side, np.int64) for side in plugin.order(windows)))
        if windows.length.max(initial=0) > self.config.seq:
            raise LedgerError(f"a window of {windows.length.max()} tokens: expected at most eval.seq={self.config.seq}")
        pairs = np.stack([windows.start, windows.first])
        if pairs.shape[1] != np.unique(pairs, axis=1).shape[1]:
            raise LedgerError("a window is to be scored twice: there is a single pass, without a choice", "D10")
        counts = covered(windows, begin, end)
        if (counts != wanted).any():
            place = int(np.argmax(counts != wanted))
            raise LedgerError(f"target {begin + place} is to be scored {counts[place]} times, expected once", "D5")
        check_order(given, windows, self.split.document_starts)
        return windows

    def todo(self, positions: np.ndarray) -> np.ndarray:
        """Return which targets a forward pass has to score: with plug-ins all of them, even if it only repeats them."""
        return np.ones(len(positions), bool) if self.plugins else ~self.ledger.written(positions)

    def skip(self, passes: int) -> bool:
        """Whether the next `passes` forward passes are not needed: what they taught the plug-ins is in their copy."""
        if self._number + passes > self._done:
            return False
        self._number += passes
        return True

    def windows(self, part: Windows) -> None:
        """Score at most `rows` windows in one forward pass."""
        engine = self.engine
        view, targets = view_of(self.split, part, self.rows, self.config.seq)
        tokens = view.tokens
        if self.predictors:
            self.predict(view, targets)
            return
        start = None if self._most == 1 else lambda: engine.nll_later(tokens, targets, self.often)
        self.put(
            view,
            targets,
            lambda: engine.nll(tokens, targets),
            lambda: log_softmax(np.asarray(engine.logits(tokens))),
            start,
        )

    def predict(self, view: View, targets: np.ndarray, state: Any = None) -> Any:
        """Score a forward pass, on from `state` if there is one, as the predictors say; return its tape."""
        prediction = predict_together(self.predictors, view, self.split.tokenizer.vocab)
        tape = self.engine.predicted(view.tokens, targets, prediction, state)
        self.put(view, targets, tape.nll, tape.logprobs, moments=tape.moments)
        return tape

    def put(
        self,
        view: View,
        targets: np.ndarray,
        nll: Callable[[], np.ndarray],
        logprobs: Callable[[], np.ndarray],
        start: Callable[[], Callable[[], np.ndarray]] | None = None,
        moments: Callable[[], np.ndarray | None] = lambda: None,
    ) -> None:
        """Score a forward pass: `nll` or, for the user's plug-ins, `logprobs` of the view, both not computed yet.

        `start` starts `nll` and returns what waits for it: such passes are read together, since nothing learns here.
        """
        if not view.kept.any():
            return
        self._number += 1
        if self._number <= self._done:
            return
        watched = self._watch is not None and self._watch.wants(self._number)
        tokens, positions, kept, before = view
        before = None if before is None else _read_only(before)
        shown = View(_read_only(tokens), _read_only(positions), _read_only(kept), before)
        if start is not None and not watched:
            self._under_way.append((shown, targets, start()))
            if self._number == 1 or len(self._under_way) >= self._most:  # the first at once: it says what goes wrong
                self.flush()
            return
        self.flush()
        whole = logprobs() if self._strangers or watched else None
        if self._strangers:
            assert whole is not None
            for plugin in self._strangers:
                shape = whole.shape
                whole = np.asarray(plugin.predict(whole, shown))
                if whole.shape != shape:
                    raise LedgerError(f"{_name(plugin)}: predictions of shape {whole.shape}, expected {shape}", "D8")
                _check_logprobs(plugin, whole, view.kept)
            nats = -np.take_along_axis(whole, targets[..., None].astype(np.int64), -1)[..., 0].astype(np.float64)
        else:
            nats = np.asarray(nll(), np.float64)
        _check_shape(nats, targets)
        if watched:
            assert self._watch is not None and whole is not None
            self._watch.see(view, targets, nats, whole)
        self._enter(shown, targets, nats, moments())

    def flush(self) -> None:
        """Wait for the passes that are under way and enter what they gave, in their order."""
        under_way, self._under_way = self._under_way, []
        for view, targets, wait in under_way:
            nats = np.asarray(wait(), np.float64)
            _check_shape(nats, targets)
            self._enter(view, targets, nats)

    def _enter(self, view: View, targets: np.ndarray, nats: np.ndarray, moments: np.ndarray | None = None) -> None:
        """Write what a pass gave into the ledger, then let the user's plug-ins learn from it."""
        row, column = np.nonzero(view.kept)
        given = Pass(self._number, view.positions[row, column], nats[row, column], moments)
        if self._ranks.world > 1:
            self._held.append(given)
            return
        scored = self._written(given)
        if self.predictors:
            self._round.append((scored, moments))
        if self._strangers:
            costs = self.ledger.entries["nats"][given.positions - 1]  # as written: a repeated pass may round otherwise
            text = ScoredText(scored, view, row, column, targets[row, column], costs)
            for plugin in self._strangers:
                plugin.learn(text)
            if not self.predictors:  # else what they have yet to learn from would be lost
                self._copy()

    def _written(self, given: Pass) -> tuple[Scored, ...]:
        """Write a pass into the ledger, or confirm what is there from an evaluation that was killed."""
        if self.plugins and given.number <= self._before:
            return self.ledger.confirm(given.positions, given.nats, self.learner.version, given.number)
        return self.ledger.write(given.positions, given.nats, self.learner.version)

    def close(self) -> None:
        """End the pass: what was computed is entered, the engine gets its own weights back, copies go."""
        self.flush()
        self.learner.close()
        if self.ledger.complete():
            self._snapshots.remove()

    def _copy(self) -> None:
        """Copy now and then what the plug-ins know after this pass."""
        if self._snapshots.due:
            sides = {"learner": self.learner.state(), **{str(i): p.state() for i, p in enumerate(self.plugins)}}
            self._snapshots.write(Snapshot({"number": self._number, "version": self.learner.version}, sides))

    def _restore(self) -> None:
        """Go on from what rank 0 has copied."""
        copy = self._snapshots.read(self._ranks, "number", "version")
        if copy is None:
            return
        if copy.place["number"] > self._before:
            raise self._snapshots.refused("is of another ledger")
        try:
            self.learner.load(copy.sides.get("learner", {}), copy.place["version"])
            for i, plugin in enumerate(self.plugins):
                plugin.load(copy.sides.get(str(i), {}))
        except Exception as error:  # whatever a plug-in raises that has become another one
            self.learner.close()
            raise self._snapshots.refused(f"is not of these plug-ins ({error!r})") from error
        self._done = copy.place["number"]


def _check_logprobs(plugin: Plugin, logprobs: np.ndarray, kept: np.ndarray) -> None:
    """Raise LedgerError unless the predictions are real log-probabilities: finite, and at most 0 but for rounding."""
    if logprobs.dtype not in (np.float32, np.float64):  # others may hide a part of themselves from sums and costs
        raise LedgerError(f"{_name(plugin)}: predictions of type {logprobs.dtype}, expected float32 or float64", "D8")
    if not _between(logprobs) and not _between(logprobs[kept]):
        low, high = logprobs[kept].min(), logprobs[kept].max()
        words = f"log-probabilities from {low:.6g} to {high:.6g}: expected finite numbers, none above 0"
        raise LedgerError(f"{_name(plugin)}: {words}", "D8")


def _between(logprobs: np.ndarray) -> bool:
    return bool(np.isfinite(logprobs.min()) and logprobs.max() <= ROUNDING)


def _check_shape(nats: np.ndarray, targets: np.ndarray) -> None:
    """Raise LedgerError unless there is a cost for every target."""
    if nats.shape != targets.shape:
        raise LedgerError(f"the engine returned nll of shape {nats.shape}, expected {targets.shape}")


def _read_only(array: np.ndarray) -> np.ndarray:
    """Return a view that a plug-in cannot write to: what is scored is not its to change."""
    view = array.view()
    view.flags.writeable = False
    return view


def _name(plugin: Plugin) -> str:
    return f"plug-in {type(plugin).__name__}"
