"""What a scoring has come to so far: bits per byte of what is in its ledger, and how fast it goes."""

import time

import numpy as np

from core.data.dataset import Split
from core.scoring.accounting import bits_per_byte
from core.scoring.ledger import Ledger

PAUSE = 50
"""How much longer than it took to bring the sums up to date they then stand: at most a fiftieth of the time goes."""


class Tally:
    """Sums of what is in a ledger, which it only reads; as text what a progress line shows of them."""

    def __init__(self, ledger: Ledger, split: Split) -> None:
        self._ledger, self._split = ledger, split
        self._table = split.tokenizer.table_fault is None and not split.unknown_tokens
        self._writes = self._targets = self._bytes = 0
        self._nats, self._words, self._wait = 0.0, "", 0.0
        self._began, self._before = time.monotonic(), int(np.count_nonzero(ledger.entries["order"]))

    def __str__(self) -> str:
        now = time.monotonic()
        if now >= self._wait:
            self._update()
            rate = (self._targets - self._before) / max(now - self._began, 1e-9)
            self._words = f"{self._so_far()}, {rate:,.0f} tokens/s"
            after = time.monotonic()
            self._wait = after + PAUSE * (after - now)
        return self._words

    def _so_far(self) -> str:
        if self._bytes:
            return f"{bits_per_byte(self._nats, self._bytes):.4f} bits per byte so far"
        return f"{self._nats / max(self._targets, 1):.4f} nats per token so far"

    def _update(self) -> None:
        """Add what was written since the last time. Only a table says what a part of a document has in bytes."""
        entries = self._ledger.entries
        places = np.flatnonzero(entries["order"] > self._writes)
        self._writes = self._ledger.writes
        if not len(places):
            return
        self._targets += len(places)
        self._nats += float(entries["nats"][places].sum())
        if self._table:
            ends = np.append(np.flatnonzero(np.diff(places) != 1), len(places) - 1)
            begins = np.append(0, ends[:-1] + 1)
            for first, last in zip(places[begins].tolist(), places[ends].tolist(), strict=True):
                self._bytes += int(self._split.costs(first + 1, last + 2).sum(dtype=np.int64))
