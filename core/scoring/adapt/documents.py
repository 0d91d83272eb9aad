"""Which documents learn side by side: documents -> batches -> rounds -> ranks, and the windows of their chunks.

A document's adapters see no other document, so batches may be scored in any order, by any rank. Batch i of a round is
its slot i and rank i % world scores it: what a document is scored with is the same for any number of ranks.
"""

from typing import NamedTuple

import numpy as np

from core.config import EvalConfig
from core.data.dataset import Split
from core.scoring.evaluation import Evaluation
from core.scoring.predictions import LONGEST, View
from core.scoring.windows import document_ranges


class Documents(NamedTuple):
    """Documents that are scored side by side, one in each row of a forward pass; fewer than rows in a last batch."""

    begin: np.ndarray  # (documents,) int64: place of the first input in the text
    targets: np.ndarray  # (documents,) int64: the last one is the next document's BOS
    number: np.ndarray  # (documents,) int64: place in the order of scoring, from 0

    @property
    def end(self) -> np.ndarray:
        """(documents,) int64: place of the last target."""
        return self.begin + self.targets

    def take(self, index: slice | np.ndarray) -> "Documents":
        """Return some of the documents."""
        return Documents(*(side[index] for side in self))


class DocumentChunk(NamedTuple):
    """The next targets of each document and the window that they are scored in; an ended document's row is zero."""

    view: View
    targets: np.ndarray  # (rows, width) int32
    last: np.ndarray  # (rows,) bool: nothing comes after it, so that nothing learns from it
    used: np.ndarray  # (rows,) int64: inputs of the window; what is behind them is padding


def documents_of(evaluation: Evaluation) -> Documents:
    """Return the documents of an evaluation in the order of scoring; tokens before the first BOS count as one."""
    starts, tokens = evaluation.split.document_starts, len(evaluation.split)
    if evaluation.drawn is not None:
        begins, ends = evaluation.ranges()
        text = np.argsort(begins, kind="stable")
        begins, ends = begins[text], ends[text]
    elif evaluation.carries and not evaluation.isolated:  # to the model the whole text is one stream
        begins, ends = evaluation.ranges()
    else:
        begins, ends = document_ranges(tokens, np.union1d(np.zeros(1, np.int64), starts))
    begins, targets = begins[ends > begins], (ends - begins)[ends > begins]
    if evaluation.config.adapt.order == "length":
        longest = np.argsort(-targets, kind="stable")
        begins, targets = begins[longest], targets[longest]
    return Documents(begins, targets, np.arange(len(begins)))


def rounds_of(documents: Documents, side_by_side: int, size: int) -> list[list[Documents]]:
    """Return the rounds: `size` batches each, of `side_by_side` documents each; the last ones may be shorter."""
    count = len(documents.begin)
    batches = [documents.take(slice(i, i + side_by_side)) for i in range(0, count, side_by_side)]
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def chunks_in(targets: np.ndarray, chunk: int) -> np.ndarray:
    """Return how many chunks documents of so many targets have."""
    return -(-targets // chunk)


def width_of(number: int, chunk: int, longest: int) -> int:
    """Return the static width of the window of chunk `number`: at least what it reads, at most `longest` tokens.

    Widths are 1, 2, 3, 4, 6, 8, 12, 16, ... chunks: few shapes to compile, at most half as much again to compute. It
    does not hang on the other documents of a batch, nor on where this one ends.
    """
    wanted = min((number + 1) * chunk, longest)
    power = 1 << (max(1, -(-wanted // chunk)).bit_length() - 1)
    steps = (power, power + power // 2, 2 * power)
    return next(min(step * chunk, longest) for step in steps if min(step * chunk, longest) >= wanted)


def chunk_of(split: Split, documents: Documents, rows: int, number: int, config: EvalConfig) -> DocumentChunk:
    """Return chunk `number` of each document.

    Its window is what the document has before the chunk's end, at most eval.seq tokens; with carry, where a state
    knows what came before, the window is the chunk alone.
    """
    chunk, carries = config.adapt.chunk, config.windows == "stateful"
    width = chunk if carries else width_of(number, chunk, config.seq)
    tokens, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    positions, kept = np.zeros((rows, width), np.int64), np.zeros((rows, width), bool)
    last, used = np.ones(rows, bool), np.zeros(rows, np.int64)
    before = np.full((rows, LONGEST), -1, np.int32) if carries else None
    for row, (begin, count) in enumerate(zip(documents.begin.tolist(), documents.targets.tolist(), strict=True)):
        first, end = number * chunk, min((number + 1) * chunk, count)
        if first >= end:
            continue
        start = first if carries else max(0, end - config.seq)
        text, length = split.read(begin + start, begin + end + 1), end - start
        tokens[row, :length], targets[row, :length] = text[:-1], text[1:]
        positions[row, :length] = np.arange(begin + start + 1, begin + end + 1)
        kept[row, first - start : length] = True
        last[row], used[row] = end == count, length
        if before is not None and first:
            earlier = split.read(begin + max(0, first - LONGEST), begin + first)
            before[row, -len(earlier) :] = earlier
    return DocumentChunk(View(tokens, positions, kept, before), targets, last, used)
