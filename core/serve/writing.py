"""Text that a served model writes, as it comes: the tokens of each pass, and what it thought of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.engine.protocol import State
from core.serve.models import Served
from core.serve.work import Client


class Heard:
    """An engine that remembers its last pass: `generate.write` tells which tokens came, not by which logits."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._tape: Any = None
        self._kept = np.zeros(0, np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def commit(self, tape: Any, n: np.ndarray) -> State:
        """Do what the engine does."""
        self._tape, self._kept = tape, n
        return self._engine.commit(tape, n)

    def logits(self, row: int, count: int) -> np.ndarray:
        """Return the logits that the last `count` tokens of a row were said by, (count, vocab)."""
        end = int(self._kept[row])
        return self._tape.logits()[row, end - count : end]


@dataclass
class Growing:
    """A text that a model writes, and what of it was told."""

    text: Text
    shown: str = field(init=False)
    told: int = field(init=False)

    def __post_init__(self) -> None:
        self.shown, self.told = str(self.text), self.text.begin


@dataclass(frozen=True)
class Said:
    """What a text got in one pass."""

    place: int
    """Which of the texts."""
    more: str
    """The letters that are complete now."""
    ids: list[int]
    """The tokens, without the end of the document."""
    logits: np.ndarray | None
    """By which they were said, (tokens, vocab), if that was asked for."""
    reason: str | None
    """Why the text ends here: tokens (it has as many as asked for), end (the document ends); None: it goes on."""


def writing(
    model: Served, texts: Sequence[Text], how: Decoding, client: Client, explained: bool = False
) -> Iterator[Said]:
    """Yield what texts, ROWS of them at most, get pass by pass, until all are done or the time is over."""
    engine: Any = Heard(model.engine) if explained else model.engine
    growing = {id(text): (place, Growing(text)) for place, text in enumerate(texts)}
    twin = model.twin if how.draft == "twin" else None
    for text in write(engine, texts, how, model.limit, twin=twin):
        place, grown = growing[id(text)]
        ended = text.done and text.said < how.tokens
        now, ids = str(text), text.ids[grown.told :]
        now = now if text.done else now.rstrip("\ufffd")  # the first bytes of a letter
        logits = engine.logits(place, len(ids) + ended)[: len(ids)] if isinstance(engine, Heard) else None
        more, grown.shown, grown.told = now.removeprefix(grown.shown), now, len(text.ids)
        yield Said(place, more, ids, logits, "end" if ended else "tokens" if text.done else None)
        if not client.waits():
            return
