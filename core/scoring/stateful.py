"""Scoring with carry: a stream goes through the engine window by window, and the state goes on from one to the next."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from core.data import Split
from core.scoring.ledger import Ledger


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
    engine: Carrier,
    split: Split,
    streams: list[tuple[int, int]],
    seq: int,
    batch: int,
    ledger: Ledger,
    version: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Score the input ranges [begin, end) of `streams`, each from an empty state on, in windows of `seq` tokens.

    `batch` streams of like length go side by side; a row that has ended is filled with zeros and not looked at. A
    stream with targets that are not in the ledger is run from its start, since its state is not kept; only those are
    written.
    """
    lengths = np.array([end - begin for begin, end in streams], np.int64)
    total = int((-(-lengths // seq)).sum())
    todo = [i for i in np.argsort(-lengths, kind="stable").tolist() if not _complete(ledger, *streams[i])]
    done = total - int((-(-lengths[todo] // seq)).sum())
    for at in range(0, len(todo), batch):
        group = [streams[i] for i in todo[at : at + batch]]
        state, longest = engine.start(len(group)), group[0][1] - group[0][0]
        for offset in range(0, longest, seq):
            width = min(seq, longest - offset)
            tokens = np.zeros((len(group), width), np.int32)
            targets, kept = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
            for row, (begin, end) in enumerate(group):
                first = begin + offset
                length = max(0, min(width, end - first))
                if length:
                    text = split.read(first, first + length + 1)
                    tokens[row, :length], targets[row, :length] = text[:-1], text[1:]
                    kept[row, :length] = ~ledger.written(np.arange(first + 1, first + length + 1))
                    done += 1
            tape = engine.chunk(state, tokens)
            nats = np.asarray(tape.nll(targets), np.float64)
            positions = np.array([begin for begin, _ in group])[:, None] + offset + np.arange(width) + 1
            ledger.write(positions[kept], nats[kept], version)
            if offset + width < longest:
                state = engine.commit(tape, width)
            if progress is not None:
                progress(done, total)


def _complete(ledger: Ledger, begin: int, end: int) -> bool:
    return bool(ledger.written(np.arange(begin + 1, end + 1)).all())
