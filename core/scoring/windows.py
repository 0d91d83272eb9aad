"""Windows: how a stream of n tokens is cut so that each of its n - 1 targets is scored exactly once.

A window (start, length, first) reads the inputs tokens[start : start + length], whose targets are the tokens one later,
and scores the targets at offsets first .. length - 1: the token positions start + first + 1 .. start + length.
"""

from typing import NamedTuple

import numpy as np

from core.scoring.ledger import LedgerError


class Windows(NamedTuple):
    """Windows in stream order."""

    start: np.ndarray  # (windows,) int64
    length: np.ndarray  # (windows,) int64, at most seq
    first: np.ndarray  # (windows,) int64, below length

    def take(self, index: slice | np.ndarray) -> "Windows":
        """Return some of the windows: a slice, indices or a mask."""
        return Windows(self.start[index], self.length[index], self.first[index])


def cut(begins: np.ndarray, ends: np.ndarray, seq: int, stride: int) -> Windows:
    """Return the windows of the input ranges [begin, end): the first scores all its targets, each later one `stride`.

    The last window of a range may be shorter. A target past the first window sees at least seq - stride + 1 inputs.
    """
    targets = ends - begins
    counts = np.where(targets > 0, 1 + np.maximum(0, -((seq - targets) // stride)), 0)
    piece = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = begins[piece] + number * stride
    return Windows(start, np.minimum(seq, ends[piece] - start), np.where(number == 0, 0, seq - stride))


def sliding(tokens: int, seq: int, stride: int) -> Windows:
    """Return windows that overlap by seq - stride over a stream of `tokens` tokens."""
    return cut(np.zeros(1, np.int64), np.array([tokens - 1], np.int64), seq, stride)


def document_ranges(tokens: int, document_starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (begins, ends) of every document's inputs, int64: its last target is the next document's BOS."""
    begins = np.asarray(document_starts, np.int64)
    return begins, np.append(begins[1:], tokens - 1)


def document_windows(tokens: int, document_starts: np.ndarray, seq: int, stride: int) -> Windows:
    """Return sliding windows inside each document; tokens before the first BOS count as a document."""
    begins = np.union1d(np.zeros(1, np.int64), document_starts)
    return cut(*document_ranges(tokens, begins), seq, stride)


def check_order(given: Windows, order: Windows, starts: np.ndarray) -> None:
    """Raise LedgerError unless `order` holds the windows of `given`, those of each document in the text's order."""
    first, place = (np.argsort(side.start + side.first, kind="stable") for side in (given, order))
    if any(not np.array_equal(a[first], b[place]) for a, b in zip(given, order, strict=True)):
        raise LedgerError("the windows were cut anew: a plug-in may change their order, not what they read", "D10")
    text = order.take(place)
    opened = np.searchsorted(starts, text.start + text.first, "right")  # the document of its first target
    ended = np.searchsorted(starts, text.start + text.length - 1, "right")
    backwards = (opened[1:] == ended[:-1]) & (place[1:] < place[:-1])
    if backwards.any():
        target = text.start[1:][backwards][0] + text.first[1:][backwards][0] + 1
        words = "is to be scored before earlier parts of its document: each is read from left to right"
        raise LedgerError(f"target {target} {words}", "D10")


def covered(windows: Windows, begin: int, end: int) -> np.ndarray:
    """Return how often each target position from begin to end (inclusive) is scored."""
    steps = np.zeros(end - begin + 2, np.int64)
    first, last = windows.start + windows.first + 1 - begin, windows.start + windows.length + 1 - begin
    inside = (first >= 0) & (last <= end - begin + 1) & (first < last)
    if not inside.all():
        raise LedgerError(f"a window scores targets outside {begin} to {end}, or none", "D5")
    np.add.at(steps, first, 1)
    np.add.at(steps, last, -1)
    return np.cumsum(steps)[:-1]
