"""Who guesses the tokens that a model will write next: for nothing, text by text, or by a pass over all rows."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from core.engine.protocol import State

ORDERS = range(6, 1, -1)
"""Lengths of the endings that NGrams looks for, longest first."""


class Drafter(Protocol):
    """What drafts one text."""

    guesses: bool
    """Whether `see` wants what the model says behind the first wrong draft."""

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """Return at most `count` tokens that may follow `ids`."""
        ...

    def see(self, guesses: list[int]) -> None:
        """Learn what the model said in the same pass behind what was kept, one token for each further place."""
        ...


class RowDrafter(Protocol):
    """What drafts all rows in one pass of its own: a twin of the model (docs/orthrus.md)."""

    def draft(self, state: State, anchor: np.ndarray, block: int) -> Any:
        """Return a Tape whose place i says what follows the i-th token from `anchor` (rows,) on, (rows, block) of them.

        `anchor`: the tokens that `state` has not read; nothing changes it.
        """
        ...


class Nothing:
    """Drafts nothing: the model says one token in every pass."""

    guesses = False

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """Return no token."""
        return []

    def see(self, guesses: list[int]) -> None:
        """Learn nothing."""


class NGrams(Nothing):
    """Drafts what followed when the text last ended as it ends now (Saxena 2023: prompt lookup)."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}
        self._known = 1

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """Return what followed the longest ending that the text had before, at its last place."""
        for place in range(self._known, len(ids)):
            for order in ORDERS:
                if order <= place:
                    self._follows[tuple(ids[place - order : place])] = place
        self._known = max(self._known, len(ids))
        places = (self._follows.get(tuple(ids[-order:])) for order in ORDERS if order < len(ids))
        place = next((found for found in places if found is not None), None)
        if place is None:
            return []
        text = list(ids)
        for i in range(count):
            text.append(text[place + i])  # what was drafted may repeat itself
        return text[len(ids) :]


class Jacobi(Nothing):
    """Drafts what the model said in the last pass behind the first wrong draft (Santilli et al. 2023)."""

    guesses = True

    def __init__(self) -> None:
        self._guesses: list[int] = []

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the guesses of the last pass, the last of them as often as there is room."""
        last = self._guesses[-1] if self._guesses else ids[-1]
        return (self._guesses + [last] * count)[:count]

    def see(self, guesses: list[int]) -> None:
        """Keep the guesses."""
        self._guesses = guesses


DRAFTERS: dict[str, Callable[[], Drafter]] = {"none": Nothing, "ngram": NGrams, "jacobi": Jacobi}
