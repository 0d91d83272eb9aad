"""One stream: the text is scored chunk by chunk, and after each chunk the weights learn from it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from core.adapt.settings import AdaptConfig
from core.adapt.weights import LooseWeights, rate
from core.engine.protocol import AdaptStep
from core.scoring.ledger import Ledger
from core.scoring.windows import Windows


class Chunk(NamedTuple):
    """What is scored with one version of the weights, and what they learn from then."""

    number: int
    """From 0, over all texts."""
    windows: Windows
    """Those whose first scored target is in the chunk, in order; there may be none."""
    places: np.ndarray
    """(count,) int64: the positions of its targets, all scored by then; none: the last chunk of its text."""
    lr: float
    anew: bool
    """Whether a text begins: the weights are put back before its windows are scored."""


def stream_chunks(windows: Windows, adapt: AdaptConfig, document_starts: np.ndarray) -> Iterator[Chunk]:
    """Yield the chunks of a text that is cut into `windows`, in their order.

    The text is what the windows score, one after the other; with eval.adapt.reset=document each document is one, and
    no window reads two.
    """
    documents = np.zeros_like(windows.start)
    if adapt.reset == "document":
        documents = np.searchsorted(document_starts, windows.start + windows.first, "right")
    cuts = np.flatnonzero(np.diff(documents)) + 1
    number = 0
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(documents)], strict=True):
        for chunk in _chunks(windows.take(slice(begin, end)), adapt):
            yield chunk._replace(number=number)
            number += 1


def learn_chunk(weights: LooseWeights, ledger: Ledger, chunk: Chunk, adapt: AdaptConfig) -> None:
    """Let weights learn from a chunk of which every target is scored."""
    ranges = ledger.scored(chunk.places)
    step = AdaptStep("sgd", chunk.lr, decay=adapt.decay, momentum=adapt.momentum, clip=adapt.clip)
    for _ in range(adapt.steps if ranges else 0):
        weights.train(ranges, step)


def _chunks(windows: Windows, adapt: AdaptConfig) -> Iterator[Chunk]:
    """Yield the chunks of one text."""
    counts = windows.length - windows.first
    ends = np.cumsum(counts)
    total, size = int(ends[-1]), adapt.chunk
    own = (ends - counts) // size
    chunks = -(-total // size)
    for chunk in range(chunks):
        first, last = np.searchsorted(own, [chunk, chunk + 1])
        begin, end = (chunk * size, (chunk + 1) * size) if chunk + 1 < chunks else (0, 0)
        a, b = np.searchsorted(ends, [begin, end], "right")
        places = _targets(windows.take(slice(a, b + 1)))[begin - int(ends[a] - counts[a]) :][: end - begin]
        lr = rate(adapt.lr, adapt.schedule, chunk, chunks)
        yield Chunk(chunk, windows.take(slice(first, last)), places, lr, chunk == 0)


def _targets(windows: Windows) -> np.ndarray:
    """Return the positions of the targets that windows score, (targets,) int64."""
    counts = windows.length - windows.first
    begins = windows.start + windows.first + 1 - (np.cumsum(counts) - counts)
    return np.repeat(begins, counts) + np.arange(counts.sum())
