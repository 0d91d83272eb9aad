"""Adapters of documents side by side: the only way for them to learn is from what the ledger holds of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.adapt.documents import Chunk
from core.config import AdaptConfig
from core.engine.protocol import AdaptStep, Arrays
from core.model.adapters import AdapterSpec
from core.scoring.ledger import Ledger, LedgerError, Scored


class Rows:
    """Adapters, one set for each row: they score a chunk of every document, and learn from it once it is entered.

    What is trained on is read from `Scored` ranges alone, and `Ledger.advance` takes those of a row only from the row's
    adapters as they are now. Nothing else here changes adapters, and the rows of a batch begin with new ones.
    """

    def __init__(
        self, engine: Any, ledger: Ledger, spec: AdapterSpec, numbers: np.ndarray, slot: int, a: Arrays | None = None
    ) -> None:
        self._engine, self._ledger = engine, ledger
        self.numbers = numbers
        """(rows,) int64: the ledger's numbers of the rows; 0: a row that is not in use."""
        self.version = np.zeros(len(numbers), np.int64)
        """(rows,) int64: how many chunks each row has learned from."""
        self._taken = np.zeros(len(numbers), np.int64)
        self._adapters = engine.adapters(spec, len(numbers), slot, a)
        self._chunk: Chunk | None = None
        self._tape: Any = None
        self._state: Any = None

    def run(self, chunk: Chunk, prediction: Any, state: Any) -> Any:
        """Return the tape of a chunk, from `state` on where there is one: one forward pass for score and gradient."""
        given = chunk.view.tokens, chunk.targets, prediction, state
        self._chunk, self._state, self._tape = chunk, state, self._engine.adapted(self._adapters, *given)
        return self._tape

    def learn(self, scored: Sequence[Scored], adapt: AdaptConfig, lr: np.ndarray) -> None:
        """Update the rows of these ranges of the last `run`, `adapt.steps` times with the learning rates `lr` (rows,).

        LedgerError for a range that a row cannot learn from. Further updates need a further pass, which is not entered.
        """
        shares = self._shares(scored)
        for again in range(adapt.steps if shares.any() else 0):
            if again:
                assert self._chunk is not None
                given = self._chunk.view.tokens, self._chunk.targets, None, self._state
                self._tape = self._engine.adapted(self._adapters, *given)
            constants = {name: getattr(adapt, name) for name in ("rule", "beta1", "beta2", "eps", "decay", "momentum")}
            step = AdaptStep(**constants, lr=lr, clip=adapt.clip, taken=self._taken)
            self._adapters = self._engine.adapt(self._tape, shares, step)
            self._taken = self._taken + shares.any(axis=1)
        self._chunk = self._tape = self._state = None

    def a(self) -> Arrays:
        """Return A by site: what the next round's adapters of this slot may begin with."""
        return self._adapters.a()

    def _shares(self, scored: Sequence[Scored]) -> np.ndarray:
        """Return the weight of every target in its row's loss, a mean over the row's ranges, and count their update."""
        if self._chunk is None:
            raise LedgerError("adapters are to learn from a chunk that was not scored, or twice from one", "D9")
        positions, kept = self._chunk.view.positions, self._chunk.view.kept
        shares, places = np.zeros(kept.shape), {number: row for row, number in enumerate(self.numbers) if number}
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
