"""Windows: how a stream of n tokens is cut so that each of its n - 1 targets is scored exactly once.

A window (start, length, first) reads the inputs tokens[start : start + length], whose targets are the tokens one later,
and scores the targets at offsets first .. length - 1: the token positions start + first + 1 .. start + length.
"""

from typing import NamedTuple

import numpy as np


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
