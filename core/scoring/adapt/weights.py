"""The scored weights, as text that is in the ledger may move them: by SGD, one update on all its targets at a time."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from core.data.batch import Batch
from core.data.dataset import Split
from core.engine.adapting import AdaptStep
from core.engine.protocol import Arrays, Engine, StepResult
from core.engine.ranks import share
from core.scoring.adapt.freeze import Freeze
from core.scoring.ledger import Ledger, LedgerError, Scored


def rate(lr: float, schedule: str, chunk: int, chunks: int) -> float:
    """Return the learning rate of a chunk, from 0, of so many: along a cosine that would be 0 after the last."""
    return lr * (1 + math.cos(math.pi * chunk / chunks)) / 2 if schedule == "cosine" else lr


def scored_rows(split: Split, ledger: Ledger, ranges: Sequence[Scored], seq: int) -> Batch:
    """Return rows of `seq` inputs and targets, range after range; the last row ends with pads, whose target is -1.

    Every target has the input that it was scored with. LedgerError if a range is not in the ledger.
    """
    if not ranges:
        raise LedgerError("weights are to learn from nothing that was scored", "D9")
    for one in ranges:
        ledger.nats(one)
    texts = [split.read(one.start - 1, one.stop) for one in ranges]
    inputs, targets = np.concatenate([t[:-1] for t in texts]), np.concatenate([t[1:] for t in texts])
    pads = -len(inputs) % seq
    tokens, targets = np.pad(inputs, (0, pads)), np.pad(targets, (0, pads), constant_values=-1)
    return Batch(tokens.reshape(-1, seq), targets.reshape(-1, seq))


class LooseWeights:
    """Some of the scored weights, which learn from scored text; `close` puts them back.

    Ranks call every method together: each has its share of an update's rows, and all have the same weights.
    """

    def __init__(self, engine: Any, split: Split, ledger: Ledger, seq: int, names: Sequence[str]) -> None:
        self._engine, self._split, self._ledger, self._seq = cast(Engine, engine), split, ledger, seq
        self._names, self._freeze = tuple(names), Freeze(engine, names)
        self._engine.loosen(self._names)
        self.version = 0
        """Version of the weights: how often they were changed."""
        self.moved = False
        """Whether they are others than at the start."""
        self.skipped = 0
        """Updates that were left out, since loss or gradients were not finite."""

    def train(self, ranges: Sequence[Scored], step: AdaptStep) -> StepResult:
        """Take one update on all targets of scored ranges; LedgerError if one of them was not scored."""
        rows = scored_rows(self._split, self._ledger, ranges, self._seq)
        mine = share(len(rows.tokens), self._engine.ranks)
        done = self._engine.descend(Batch(rows.tokens[mine], rows.targets[mine]), step)
        self.moved, self.version, self.skipped = True, self.version + 1, self.skipped + (not done.finite)
        return done

    def forget(self) -> None:
        """Set the momenta to 0."""
        self._engine.forget_momenta()

    def reset(self) -> None:
        """Put the weights back as they were, if they have moved: as a new version, with momenta of 0."""
        if self.moved:
            self._engine.tighten()
            self._engine.loosen(self._names)
            self.moved, self.version = False, self.version + 1

    def check(self) -> None:
        """Raise LedgerError if a weight has changed that was not to."""
        self._freeze.check()

    def state(self) -> Arrays:
        """Return what an interrupted evaluation needs to go on, beside `version` and `moved`."""
        return self._engine.loosened()

    def load(self, state: Arrays, version: int, moved: bool = True) -> None:
        """Go on from `state`."""
        self._engine.load_loosened(state)
        self.moved, self.version = moved, version

    def close(self) -> None:
        """Put the weights back, and check that all others stayed as they were."""
        try:
            self.check()
        finally:
            self._engine.tighten()
