"""Adapters of documents side by side: the only way for them to learn is from what the ledger holds of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.config import AdaptConfig
from core.engine.adapting import AdaptStep
from core.engine.protocol import Arrays, State
from core.model.adapters import AdapterSpec
from core.scoring.adapt.documents import DocumentChunk, Documents
from core.scoring.ledger import Ledger, LedgerError, Scored
from core.scoring.predictions import Prediction


class Rows:
    """Adapters, one set for each row: they score a chunk of every document, and learn from it once it is entered.

    What is trained on is read from `Scored` ranges alone, and `Ledger.advance` takes those of a row only from the row's
    adapters as they are now. Nothing else changes adapters; those of a document score no other one, and begin anew.
    """

    def __init__(
        self,
        engine: Any,
        ledger: Ledger,
        spec: AdapterSpec,
        documents: Documents,
        rows: int,
        slot: int,
        a: Arrays | None = None,
    ) -> None:
        self._engine, self._ledger = engine, ledger
        self.numbers, self._begin, self._end = (np.zeros(rows, np.int64) for _ in range(3))
        self.numbers[: len(documents.number)] = documents.number + 1  # the ledger's; 0: a row that is not in use
        self._begin[: len(documents.begin)], self._end[: len(documents.begin)] = documents.begin, documents.end
        self.version = np.zeros(rows, np.int64)
        """(rows,) int64: how many chunks each row has learned from."""
        self._taken = np.zeros(rows, np.int64)
        self._adapters = engine.adapters(spec, rows, slot, a)
        self._chunk: DocumentChunk | None = None
        self._tape: Any = None
        self._state: State | None = None
        self._often = False

    def run(self, chunk: DocumentChunk, prediction: Prediction | None, state: State | None, often: bool = False) -> Any:
        """Return the tape of a chunk, from `state` on where there is one: one forward pass for score and gradient.

        `often`: so many passes will come that compiling for them pays. LedgerError for a row of another document.
        """
        positions = chunk.view.positions
        beyond = chunk.view.kept & ~((positions > self._begin[:, None]) & (positions <= self._end[:, None]))
        if beyond.any():
            row = int(np.argmax(beyond.any(axis=1)))
            raise LedgerError(
                f"target {positions[row][beyond[row]][0]} is not of the document of row {self.numbers[row]}, whose "
                "adapters are reset at its end",
                "D9",
            )
        self._chunk, self._state, self._often = chunk, state, often
        self._tape = self._adapted(prediction)
        return self._tape

    def learn(self, scored: Sequence[Scored], adapt: AdaptConfig, lr: np.ndarray) -> None:
        """Update the rows of these ranges of the last `run`, `adapt.steps` times with the learning rates `lr` (rows,).

        LedgerError for a range that a row cannot learn from. Further updates need a further pass, which is not entered.
        """
        shares = self._shares(scored)
        for again in range(adapt.steps if shares.any() else 0):
            if again:
                self._tape = self._adapted(None)
            constants = {name: getattr(adapt, name) for name in ("rule", "beta1", "beta2", "eps", "decay", "momentum")}
            step = AdaptStep(**constants, lr=lr, clip=adapt.clip, taken=self._taken)
            self._adapters = self._engine.adapt(self._tape, shares, step)
            self._taken = self._taken + shares.any(axis=1)
        self._chunk = self._tape = self._state = None

    def _adapted(self, prediction: Prediction | None) -> Any:
        assert self._chunk is not None
        given = self._chunk.view.tokens, self._chunk.targets, prediction, self._state, self._often
        return self._engine.adapted(self._adapters, *given)

    def a(self) -> Arrays:
        """Return A by site: what the next round's adapters of this slot may begin with."""
        return self._adapters.a()

    def _shares(self, scored: Sequence[Scored]) -> np.ndarray:
        """Return the weight of every target in its row's loss, a mean over the row's ranges, and count their update."""
        if self._chunk is None:
            raise LedgerError("adapters are to learn from a chunk that was not scored, or twice from one", "D9")
        positions, kept = self._chunk.view.positions, self._chunk.view.kept
        shares, places = (
            np.zeros(kept.shape),
            {number: row for row, number in enumerate(self.numbers.tolist()) if number},
        )
        ranges: dict[int, list[Scored]] = {}
        for one in scored:
            ranges.setdefault(one.row, []).append(one)
        for number, own in ranges.items():
            row = places.get(number)
            inside = np.zeros(kept.shape[1], bool)
            for one in own if row is not None else ():
                inside |= (positions[row] >= one.start) & (positions[row] < one.stop)
            count = sum(one.stop - one.start for one in own)
            if row is None or not np.array_equal(inside, kept[row]) or inside.sum() != count:
                raise LedgerError(
                    f"row {number} is to learn from other targets than those that it has just scored", "D9"
                )
            self.version[row] = self._ledger.advance(own, number)
            shares[row] = inside / count
        return shares
