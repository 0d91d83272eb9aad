"""Scoring with carry: a stream goes through the engine window by window, and the state goes on from one to the next."""

import functools
from typing import Any, Protocol, cast

import numpy as np

from core.scoring.plugins import log_softmax
from core.scoring.predictions import LONGEST, View
from core.scoring.session import Progress, Session
from core.scoring.windows import Windows


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


def score_streams(session: Session, streams: Windows, progress: Progress | None) -> None:
    """Score streams, longest first, each from an empty state on, in windows of `seq` tokens.

    `batch` streams of like length go side by side; a row that has ended is filled with zeros and not looked at. A
    stream with targets that are not in the ledger is run from its start, since its state is not kept; only those are
    written.
    """
    seq, batch, engine = session.config.seq, session.config.batch, cast(Carrier, session.engine)
    passes = session.evaluation.passes
    total = int(passes(streams).sum())
    done = 0 if session.plugins else int(passes(streams)[session.ledger.written(streams.start + streams.length)].sum())
    for _, group in session.turns(streams, batch):
        longest = int(group.length[0])
        if session.skip(-(-longest // seq)):
            done += int(passes(group).sum())
            continue
        state, before = engine.start(len(group.start)), np.zeros((len(group.start), 0), np.int32)
        for offset in range(0, longest, seq):
            width = min(seq, longest - offset)
            tokens = np.zeros((len(group.start), width), np.int32)
            targets, kept = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
            positions = np.zeros(tokens.shape, np.int64)
            for row, (begin, all_) in enumerate(zip(group.start.tolist(), group.length.tolist(), strict=True)):
                first = begin + offset
                length = max(0, min(width, all_ - offset))
                if length:
                    text = session.split.read(first, first + length + 1)
                    tokens[row, :length], targets[row, :length] = text[:-1], text[1:]
                    positions[row, :length] = np.arange(first + 1, first + length + 1)
                    kept[row, :length] = session.todo(positions[row, :length])
                    done += 1
            view = View(tokens, positions, kept, before)
            if session.predictors:
                tape = session.predict(view, targets, state)
            else:
                tape = engine.chunk(state, tokens)
                session.put(view, targets, functools.partial(tape.nll, targets), functools.partial(_logprobs, tape))
            before = np.concatenate([before, tokens], axis=1)[:, -LONGEST:]
            if offset + width < longest:
                state = engine.commit(tape, width)
            if progress is not None:
                progress(done, total)


def _logprobs(tape: Any) -> np.ndarray:
    """Return the log-probabilities of every position of a chunk."""
    return log_softmax(np.asarray(tape.logits()))
