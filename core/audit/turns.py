"""What each target may have been scored with: whose learning had a part in it, and what that had read by then."""

from typing import NamedTuple

import numpy as np

from core.config import RunConfig
from core.data.dataset import Split
from core.scoring.adapt.documents import documents_of
from core.scoring.adapt.stream import stream_chunks, targets_of
from core.scoring.evaluation import Evaluation

LATE = np.iinfo(np.int64).max


class Turns(NamedTuple):
    """When what learns may have learned from each target of a text, by what the settings say."""

    learner: np.ndarray  # (tokens,) int64: what learns from it: its document's adapters, or one for the whole text
    turn: np.ndarray  # (tokens,) int64: that scores it with what it learned from smaller turns, and from no others
    round: np.ndarray  # (tokens,) int64: what all share has learned from smaller rounds alone
    shared: np.ndarray  # (tokens,) bool: whether what all share has a part in its prediction

    def learned(self, places: np.ndarray) -> np.ndarray:
        """Return which targets may be scored with what was learned from the targets at `places`, (tokens,) bool."""
        first = np.full(int(self.learner.max(initial=0)) + 1, LATE)
        np.minimum.at(first, self.learner[places], self.turn[places])
        return (self.turn > first[self.learner]) | self.shared & (self.round > self.round[places].min(initial=LATE))


def turns_of(text: Split, config: RunConfig, order: np.ndarray) -> Turns:
    """Return the turns of a text; `order` (tokens,) int64: the forward pass that scored each target.

    Plug-ins and a single stream learn from pass to pass. A document's adapters learn from that document alone; a new
    document's B is 0, so that even a warm A has no part in its first chunk. SGD learns after all passes of a chunk.
    """
    settings, tokens = config.eval, len(text)
    adapt = settings.adapt
    learner, round_, shared = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64), np.zeros(tokens, bool)
    if adapt.kind == "none" or (adapt.kind == "lora" and adapt.reset == "never"):
        return Turns(learner, order, round_, shared)
    evaluation = Evaluation.of(text, config, plugins=True)
    if adapt.kind == "sgd":
        turn, texts = np.zeros(tokens, np.int64), 0
        for chunk in stream_chunks(evaluation.rows(), adapt, text.document_starts):
            texts += chunk.anew
            places = targets_of(chunk.windows)
            learner[places], turn[places] = texts, chunk.number
        shared[:] = bool(settings.plugins)
        return Turns(learner, turn, turn, shared)
    documents = documents_of(evaluation)
    together = min(adapt.documents, len(documents.begin)) * settings.round
    bounds = (side.tolist() for side in (documents.begin, documents.end, documents.number))
    for begin, end, number in zip(*bounds, strict=True):
        learner[begin + 1 : end + 1], round_[begin + 1 : end + 1] = number + 1, number // together
        shared[begin + 1 + adapt.chunk : end + 1] = adapt.warm_a
    shared |= bool(settings.plugins) or bool(settings.phases.at)
    return Turns(learner, order, round_, shared)
