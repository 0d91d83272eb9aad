"""Predictions that change on the device while a text is scored, on nothing but what has been scored already.

The host sees ids and gives candidates; the device changes the distribution and normalises it over the whole vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from core.checks import LARGEST
from core.config import require
from core.data.dataset import Split
from core.engine.protocol import Arrays
from core.scoring.ledger import Ledger, Scored
from core.scoring.windows import Windows

LONGEST = 64
"""Inputs that `View.before` has at most."""
ABOVE_1 = 1e-6
"""How far rounding may push a sum of shares above 1."""


class View(NamedTuple):
    """The windows of one forward pass. Rows that are not in use, and the ends of short ones, are zero and not kept."""

    tokens: np.ndarray  # (rows, seq) int32: inputs
    positions: np.ndarray  # (rows, seq) int64: places of the targets in the stream
    kept: np.ndarray  # (rows, seq) bool: the targets that this pass scores
    before: np.ndarray | None = None
    """(rows, n) int32: the last inputs that each row read in earlier passes, up to LONGEST; -1 or None: none."""


def view_of(split: Split, windows: Windows, rows: int, seq: int) -> tuple[View, np.ndarray]:
    """Return at most `rows` windows as one forward pass, and its targets, (rows, seq) int32.

    Windows are padded at their end and the batch with empty rows: one static shape, and a causal model cannot see the
    padding.
    """
    tokens, targets, positions = (np.zeros((rows, seq), kind) for kind in (np.int32, np.int32, np.int64))
    kept = np.zeros(tokens.shape, bool)
    for row, (start, length, first) in enumerate(zip(*(side.tolist() for side in windows), strict=True)):
        text = split.read(start, start + length + 1)
        tokens[row, :length], targets[row, :length] = text[:-1], text[1:]
        positions[row, :length] = np.arange(start + 1, start + length + 1)
        kept[row, first:length] = True
    return View(tokens, positions, kept), targets


class Tilt(NamedTuple):
    """Candidates for the next token of every position."""

    ids: np.ndarray  # (rows, seq, m) int: tokens; -1: none
    weights: np.ndarray  # (rows, seq, m) float
    kind: Literal["boost", "mix"]
    """boost: weights are added to log p, which is normalised again; mix: they are shares of the new distribution, of
    which the old one gets the rest."""
    above: float | None = None
    """Boost only where the entropy of the old distribution is above so many nats."""

    def check(self, shape: tuple[int, ...], vocab: int) -> None:
        """Raise ValueError unless these are candidates for (rows, seq) positions that make a distribution."""
        given, weights = self.ids >= 0, np.where(self.ids >= 0, self.weights, 0.0)
        if self.ids.shape[:2] != shape or self.ids.shape != self.weights.shape or self.ids.ndim != 3:
            raise ValueError(f"a tilt of {self.ids.shape} and {self.weights.shape}: expected (*{shape}, candidates)")
        if self.ids.max(initial=0) >= vocab or not np.isfinite(weights).all():
            raise ValueError(f"a tilt: expected tokens below {vocab} with finite weights")
        if self.kind == "mix" and (weights[given].min(initial=0.0) < 0 or weights.sum(-1).max() > 1 + ABOVE_1):
            raise ValueError("a tilt that mixes: expected shares from 0 up, of which a position's add up to at most 1")


class Prediction(NamedTuple):
    """How the predictions of a forward pass are changed; as it is made, not at all."""

    inverse: float = 1.0
    """1 / temperature, which comes first."""
    tilt: Tilt | None = None
    sample: np.ndarray | None = None
    """(count,) int64: places in the flattened pass where the temperature's moments are measured."""


class ScoredReader:
    """The text that is scored, of which a predictor gets what is in the ledger."""

    def __init__(self, text: Split, ledger: Ledger) -> None:
        self._text, self._ledger = text, ledger
        self.vocab, self.bos = text.tokenizer.vocab, text.tokenizer.bos

    def read(self, scored: Scored, before: int = 0) -> np.ndarray:
        """Return the tokens of a range, with up to `before` tokens of its document in front of it.

        LedgerError if the range is not scored; what is in front of it then is, since documents are read from the left.
        """
        self._ledger.nats(scored)
        starts = self._text.document_starts
        document = np.searchsorted(starts, scored.start - 1, "right") - 1
        begin = max(scored.start - before, int(starts[document]) if document >= 0 else 0)
        return self._text.read(min(begin, scored.start), scored.stop)


class Predictor:
    """What changes predictions on the device. One object serves one scoring pass, on each rank.

    What it learned decides predictions from the next round on, never those of the round that it learned from.
    """

    kind: ClassVar[Literal["temperature", "cache"]] = "cache"
    Settings: ClassVar[type | None] = None
    """A frozen dataclass whose fields have defaults: the class is made with one. None: it is made with nothing."""

    def start(self, text: ScoredReader) -> None:
        """Begin a scoring pass."""

    def prediction(self, view: View, prediction: Prediction) -> Prediction:
        """Return `prediction` with what this one adds to it."""
        return prediction

    def learn(self, ranges: Sequence[Scored], moments: np.ndarray | None) -> None:
        """Take note of what a forward pass scored: ranges of the ledger, and the moments of its sample, (2,)."""

    def state(self) -> Arrays:
        """Return what was learned, so that a killed evaluation can go on."""
        return {}

    def load(self, state: Arrays) -> None:
        """Take back what `state` returned."""


class Temperature(Predictor):
    """One temperature for all predictions, the best on what has been scored so far.

    Logits are multiplied by b = 1 / temperature. The cost of a scored target is convex in b: its slope is the expected
    log-probability less the target's, its curvature the variance. Newton's method on the sum over all scored targets so
    far, each measured at the b that was in use, with a prior in favour of 1.
    """

    @dataclass(frozen=True)
    class Settings:
        """What a run may choose."""

        prior: float = 256.0
        """Weight of b = 1, in targets of curvature 1."""

        def __post_init__(self) -> None:
            good = 0 < self.prior <= LARGEST
            require(
                good, f"eval.plugins.temperature.prior={self.prior}: expected a number above 0, at most {LARGEST:g}"
            )

    kind = "temperature"
    SAMPLE = 256
    """Targets of one pass that are looked at."""

    def __init__(self, settings: Settings | None = None) -> None:
        prior = (settings or self.Settings()).prior
        self._sums = np.array([prior, prior])

    @property
    def inverse(self) -> float:
        """The b in use."""
        return float(np.clip(self._sums[0] / self._sums[1], 0.5, 2.0))

    def prediction(self, view: View, prediction: Prediction) -> Prediction:
        """Return the prediction at this temperature, with a sample of the pass's targets, evenly spread."""
        places = np.flatnonzero(view.kept)
        pick = np.unique(np.linspace(0, len(places) - 1, self.SAMPLE).astype(np.int64))
        return prediction._replace(inverse=self.inverse, sample=places[pick])

    def learn(self, ranges: Sequence[Scored], moments: np.ndarray | None) -> None:
        """Add a pass's moments."""
        assert moments is not None
        self._sums = self._sums + moments

    def state(self) -> Arrays:
        """Return both sums."""
        return {"sums": self._sums}

    def load(self, state: Arrays) -> None:
        """Take both sums back."""
        self._sums = state["sums"].reshape(2).astype(np.float64)


def predict_together(predictors: Sequence[Predictor], view: View, vocab: int) -> Prediction:
    """Return how `predictors` together change the predictions of a pass."""
    prediction = Prediction()
    for predictor in predictors:
        prediction = predictor.prediction(view, prediction)
    if prediction.tilt is not None:
        prediction.tilt.check(view.tokens.shape, vocab)
    return prediction
