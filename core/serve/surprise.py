"""What tokens cost a model that says them or reads them, in bits, and what it would sooner have said."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from core.data.tokenizer import Tokenizer
from core.decoding.generate import CHUNK
from core.scoring.plugins import log_softmax
from core.serve.shared_engine import SharedEngine
from core.serve.work import Client

ALTERNATIVES = 5
"""Likeliest tokens that are told of every place."""
WINDOW = 32
"""Tokens behind which one spells what it spells behind all: no letter and no word is as long."""


def describe_tokens(tokenizer: Tokenizer, ids: Sequence[int], logits: np.ndarray) -> list[dict[str, Any]]:
    """Return of every token its piece, its bits and the likeliest tokens at its place, by (n, vocab) logits."""
    rows = []
    for token, bits in zip(ids, log_softmax(logits) / -math.log(2.0), strict=True):
        best = likeliest(bits, ALTERNATIVES)
        alternatives = [{"piece": tokenizer.piece(i), "bits": round(float(bits[i]), 4)} for i in best]
        piece = tokenizer.piece(int(token))
        rows.append({"piece": piece, "bits": round(float(bits[token]), 4), "alternatives": alternatives})
    return rows


def likeliest(costs: np.ndarray, count: int) -> list[int]:
    """Return the tokens that cost least, the least of them first, of (vocab,) costs."""
    count = min(count, len(costs))
    best = np.argpartition(costs, count - 1)[:count]
    return best[np.argsort(costs[best], kind="stable")].tolist()


def predictions(engine: SharedEngine, ids: np.ndarray, limit: int | None, client: Client) -> Iterator[np.ndarray]:
    """Yield the logits of `ids` (n,) from the second on, (count, vocab) at a time: what a model says as it reads.

    One that may look back on `limit` tokens only begins anew with the later half of them when it has read so many, as
    when it writes. Refused if the time is over.
    """
    state, told, begin, read = engine.start(1), 0, 0, 0
    while told < len(ids) - 1:
        client.require_time()
        count = min(CHUNK, len(ids) - 1 - begin - read, limit - read if limit else CHUNK)
        here = ids[begin + read : begin + read + count]
        tape = engine.chunk(state, here[None])
        state, again = engine.commit(tape, count), told - begin - read
        read += count
        if again < count:
            yield tape.logits()[0, again:]
            told += count - again
        if limit and read >= limit:
            state, begin, read = engine.forget(state, np.ones(1, bool)), told + 1 - max(1, limit // 2), 0


def offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return where in `text`, which tokens `ids` spell, each of them ends; of a letter in several, at the last.

    What a token adds is looked at behind WINDOW tokens or more, not behind all: that would take seconds.
    """
    ends, last = [], 0
    for begin in range(0, len(ids), WINDOW):
        context = list(ids[max(0, begin - WINDOW) : begin])
        base = last - _letters(tokenizer, context)
        for end in range(begin, min(begin + WINDOW, len(ids))):
            context.append(ids[end])
            last = min(max(last, base + _letters(tokenizer, context)), len(text))
            ends.append(last)
    return [*ends[:-1], len(text)]


def _letters(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Return how many letters tokens spell, without the first bytes of another."""
    return len(tokenizer.decode(ids).rstrip("\ufffd"))
