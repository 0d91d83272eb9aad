"""A place in a text that a caller moves on as they like: tokens go in, logits come out."""

import copy
from collections.abc import Sequence

import numpy as np

from core.checks import ConfigError, in_words, require
from core.decoding.generate import CHUNK
from core.engine.protocol import Engine


class TextState:
    """What a model knows of a text so far. `advance` moves it on; a copy goes its own way and costs nothing."""

    logits: np.ndarray
    """What follows the last token, (vocab,) float32, read-only."""

    def __init__(self, engine: Engine, vocab: int, ids: Sequence[int] | np.ndarray) -> None:
        """Read the first tokens, one or more. ConfigError."""
        self._engine, self._vocab, self._state = engine, vocab, engine.start(1)
        self.advance(ids)

    @property
    def tokens(self) -> int:
        """How many tokens it has read."""
        return int(self._state.position[0])

    def advance(self, ids: int | np.integer | Sequence[int] | np.ndarray) -> np.ndarray:
        """Read tokens, one or several, and return their logits, (tokens, vocab) float32: row i follows token i.

        ConfigError for what is no token, with nothing read.
        """
        tokens, rows = token_ids("ids", [ids] if isinstance(ids, int | np.integer) else ids, self._vocab), []
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[None, start : start + CHUNK]
            tape = self._engine.chunk(self._state, chunk)
            rows.append(np.asarray(tape.logits()[0], np.float32))
            self._state = self._engine.commit(tape, chunk.shape[1])
        logits = np.concatenate(rows)
        self.logits = logits[-1].copy()
        self.logits.flags.writeable = False  # copies share it
        return logits

    def copy(self) -> "TextState":
        """Return a state at the same place."""
        return copy.copy(self)  # the engine's state is a value: nothing changes it


def token_ids(name: str, ids: Sequence[int | np.integer] | np.ndarray, vocab: int) -> np.ndarray:
    """Return token ids as (tokens,) int32; ConfigError, which `name` begins, for none, or any out of the vocabulary."""
    expected = f"expected one or more whole numbers from 0 to {vocab - 1:,}"
    try:
        array = np.asarray(ids)
    except ValueError as error:  # rows of different lengths
        raise ConfigError(f"{name}={in_words(ids)}: {expected}") from error
    good = array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu"
    given = f"{array.dtype}, shape {array.shape}" if isinstance(ids, np.ndarray) else in_words(ids)
    require(good, f"{name}={given}: {expected}")
    low, high = int(array.min()), int(array.max())
    require(low >= 0 and high < vocab, f"{name}: from {low:,} to {high:,}; {expected}")
    return array.astype(np.int32)
