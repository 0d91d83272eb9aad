"""The freeze check: weights that are not to learn while a text is scored keep every bit."""

import hashlib
from collections.abc import Collection
from typing import Protocol

from core.engine.protocol import Arrays
from core.scoring.journal import LedgerError


class Weighed(Protocol):
    """What the check needs of an engine."""

    def weights(self) -> Arrays:
        """Return the weights that score."""
        ...


class Freeze:
    """The digests of the weights that may not move."""

    def __init__(self, engine: Weighed, moving: Collection[str]) -> None:
        self._engine, self._moving = engine, frozenset(moving)
        self._before = self._digests()

    def check(self) -> None:
        """Raise LedgerError that names the first weight whose bits have changed though it was not to learn."""
        now = self._digests()
        for name, digest in self._before.items():
            if now.get(name) != digest:
                raise LedgerError(f"{name} has changed while the text was scored, but only what eval names may learn")

    def _digests(self) -> dict[str, bytes]:
        weights = self._engine.weights().items()
        return {name: hashlib.sha256(value.data).digest() for name, value in weights if name not in self._moving}
