"""One thread for all engines: what several requests want of them is done in turns, a pass each."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from core.engine.protocol import Engine, State


class SharedEngine:
    """An engine whose passes are made in one thread, in the order in which they were asked for.

    So requests that run side by side take turns pass by pass, and none waits for another's end. It has to be one and
    the same thread that builds the engine: MLX knows an array only in the thread that made it.
    """

    def __init__(self, engine: Engine, thread: ThreadPoolExecutor) -> None:
        self.own, self.thread = engine, thread

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def turn(self, act: Callable[..., Any], *given: Any) -> Any:
        """Return what a function returns in the engine's thread."""
        return self.thread.submit(act, *given).result()

    def start(self, rows: int) -> State:
        """Do what the engine does."""
        return self.turn(self.own.start, rows)

    def chunk(self, state: State, tokens: np.ndarray) -> "SharedTape":
        """Do what the engine does."""
        return SharedTape(self.turn(self.own.chunk, state, tokens), self.turn)

    def commit(self, tape: "SharedTape", n: int | np.ndarray) -> State:
        """Do what the engine does."""
        return self.turn(self.own.commit, tape.own, n)

    def forget(self, state: State, rows: np.ndarray) -> State:
        """Do what the engine does."""
        return self.turn(self.own.forget, state, rows)

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Do what the engine does."""
        return self.turn(self.own.nll, tokens, targets)

    def nll_later(self, tokens: np.ndarray, targets: np.ndarray, often: bool) -> Callable[[], np.ndarray]:
        """Do what the engine does."""
        wait = self.turn(self.own.nll_later, tokens, targets, often)
        return lambda: self.turn(wait)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Do what the engine does."""
        return self.turn(self.own.logits, tokens)


class SharedTape:
    """A tape whose numbers come from the engine's thread."""

    def __init__(self, own: Any, turn: Callable[..., Any]) -> None:
        self.own, self._turn = own, turn

    def logits(self) -> np.ndarray:
        """Do what the tape does."""
        return self._turn(self.own.logits)

    def best(self) -> np.ndarray:
        """Do what the tape does."""
        return self._turn(self.own.best)

    def nll(self, targets: np.ndarray) -> np.ndarray:
        """Do what the tape does."""
        return self._turn(self.own.nll, targets)


class SharedDrafter:
    """A twin that drafts in the engine's thread."""

    def __init__(self, own: Any, turn: Callable[..., Any]) -> None:
        self._own, self._turn = own, turn

    def draft(self, state: State, anchor: np.ndarray, block: int) -> SharedTape:
        """Do what the twin does."""
        return SharedTape(self._turn(self._own.draft, state, anchor, block), self._turn)
