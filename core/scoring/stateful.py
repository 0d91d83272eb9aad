"""Scoring with carry: a stream goes through the engine window by window, and the state goes on from one to the next."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np

from core.scoring.plugins import View
from core.scoring.session import Session


class Carrier(Protocol):
    """What scoring with carry needs of an engine."""

    def start(self, rows: int) -> Any:
        """Return the state before the first token of `rows` texts."""
        ...

    def chunk(self, state: Any, tokens: np.ndarray) -> Any:
        """Run (rows, seq) tokens on from `state` and return their tape."""
        ...

    def commit(self, tape: Any, n: int) -> Any:
        """Return the state after the first `n` tokens of a chunk."""
        ...


def score_streams(
    session: Session, streams: list[tuple[int, int]], progress: Callable[[int, int], None] | None
) -> None:
    """Score the input ranges [begin, end) of `streams`, each from an empty state on, in windows of `seq` tokens.

    `batch` streams of like length go side by side; a row that has ended is filled with zeros and not looked at. A
    stream with targets that are not in the ledger is run from its start, since its state is not kept; only those are
    written.
    """
    seq, batch, engine = session.config.seq, session.config.batch, cast(Carrier, session.engine)
    lengths = np.array([end - begin for begin, end in streams], np.int64)
    total = int((-(-lengths // seq)).sum())
    todo = [i for i in np.argsort(-lengths, kind="stable").tolist() if _open(session, *streams[i])]
    done = total - int((-(-lengths[todo] // seq)).sum())
    for at in session.turns(range(0, len(todo), batch)):
        group = [streams[i] for i in todo[at : at + batch]]
        longest = group[0][1] - group[0][0]
        if session.skip(-(-longest // seq)):
            done += sum(-(-(end - begin) // seq) for begin, end in group)
            continue
        state = engine.start(len(group))
        for offset in range(0, longest, seq):
            width = min(seq, longest - offset)
            tokens = np.zeros((len(group), width), np.int32)
            targets, kept = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
            positions = np.zeros(tokens.shape, np.int64)
            for row, (begin, end) in enumerate(group):
                first = begin + offset
                length = max(0, min(width, end - first))
                if length:
                    text = session.split.read(first, first + length + 1)
                    tokens[row, :length], targets[row, :length] = text[:-1], text[1:]
                    positions[row, :length] = np.arange(first + 1, first + length + 1)
                    kept[row, :length] = session.todo(positions[row, :length])
                    done += 1
            tape = engine.chunk(state, tokens)
            session.put(View(tokens, positions, kept), targets, functools.partial(tape.nll, targets), tape.logits)
            if offset + width < longest:
                state = engine.commit(tape, width)
            if progress is not None:
                progress(done, total)


def _open(session: Session, begin: int, end: int) -> bool:
    """Return whether a stream has targets that must be scored."""
    return bool(session.todo(np.arange(begin + 1, end + 1)).any())
