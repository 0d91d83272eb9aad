"""An engine that reads given texts as if it had written them: what drafts come to on text that is not the model's."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.engine.protocol import Engine, State


class Follow:
    """An engine whose likeliest token is the next of a row's text as long as it is given that, else the model's own.

    Rows are as many as the texts and stay in their order, from the first token on.
    """

    def __init__(self, engine: Engine, texts: Sequence[Sequence[int]]) -> None:
        self._engine, self._texts = engine, [np.asarray(ids) for ids in texts]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def chunk(self, state: State, tokens: np.ndarray) -> Any:
        """Run tokens as the engine does; the tape's `best` is that of the texts."""
        tape = self._engine.chunk(state, tokens)
        own = tape.best

        def best() -> np.ndarray:
            said = own()
            for row, (text, begin) in enumerate(zip(self._texts, state.position.tolist(), strict=True)):
                here, after = text[begin : begin + tokens.shape[1]], text[begin + 1 : begin + 1 + tokens.shape[1]]
                wrong = np.flatnonzero(here != tokens[row, : len(here)])
                count = min(int(wrong[0]) if len(wrong) else len(here), len(after))
                said[row, :count] = after[:count]
            return said

        tape.best = best
        return tape
