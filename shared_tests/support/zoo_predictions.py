"""Cheats by predictions and claims, and what looks like them and is honest: plug-ins as in zoo.py.

A cheat that is meant to deceive behaves while it is tested: it cheats only in the first scoring pass of its process.
"""

import sys
from typing import Any

import numpy as np

from core.engine.protocol import Arrays
from core.scoring.counts import Counts
from core.scoring.plugins import Learner, Plugin, ScoredText, View, log_softmax
from core.scoring.predictions import Prediction, Predictor, Tilt
from core.scoring.windows import Windows
from shared_tests.support.zoo_honest import HonestCache, mixed

STARTED: list[int] = []
"""One entry for each scoring pass that this process has begun."""
NOISE = 1e-7
PASSES = 17
"""Forward passes of the text that the cheats were made for, at least."""


class First(Plugin):
    """Knows whether this is the scoring pass that counts."""

    kind = "temperature"
    passes = 0

    def start(self, vocab: int, learner: Learner | None) -> None:
        STARTED.append(1)
        self.counts = len(STARTED) == 1


def future(logprobs: np.ndarray, view: View) -> np.ndarray:
    """Return predictions with the next inputs of the windows, which are their targets, mixed in."""
    known = np.full_like(logprobs, np.log(1e-3 / (logprobs.shape[-1] - 1)))
    np.put_along_axis(known[:, :-1], view.tokens[:, 1:, None], np.float32(np.log(1 - 1e-3)), -1)
    known[:, -1] = logprobs[:, -1]
    return np.logaddexp(logprobs, known) - np.float32(np.log(2.0))


def shaken(logprobs: np.ndarray, size: float = NOISE) -> np.ndarray:
    """Return predictions with some noise."""
    return logprobs - np.float32(size) * np.random.default_rng().random(logprobs.shape, np.float32)


# On the device: candidates of a pass that has not been scored.


class TargetTilt(Predictor):
    """Raises the next inputs of the windows, which are their targets."""

    def prediction(self, view: View, prediction: Prediction) -> Prediction:
        ids = np.full((*view.tokens.shape, 1), -1, np.int32)
        ids[:, :-1, 0] = view.tokens[:, 1:]
        return prediction._replace(tilt=Tilt(ids, np.full(ids.shape, 2.0), "boost"))


class SoonerCounts(Counts):
    """Counts the inputs of a pass into its table of hints before they are in the ledger."""

    def prediction(self, view: View, prediction: Prediction) -> Prediction:
        self.table.count([(row, 1) for row in view.tokens])
        return super().prediction(view, prediction)


class LastAgain(Predictor):
    """Raises the input that was read last, which everybody knows: honest."""

    def prediction(self, view: View, prediction: Prediction) -> Prediction:
        ids = view.tokens[..., None]
        return prediction._replace(tilt=Tilt(ids, np.full(ids.shape, 0.1), "mix"))


# Bits that do not repeat.


class NoisyFuture(Plugin):
    """Mixes the targets in, and noise, so that no two runs are alike."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return shaken(future(logprobs, view))


class NoisyFirst(First):
    """The same, but only where it counts; all that is left for tests is the noise."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return shaken(future(logprobs, view) if self.counts else logprobs)


class Restless(Plugin):
    """Gives every prediction another temperature each time."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return log_softmax(logprobs * np.float32(1 + 0.1 * np.random.default_rng().random()))


class Faint(First):
    """Leans towards the targets by what a wide bound of rounding would let pass, but only where it counts."""

    lean = 0.02

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        leant = logprobs.copy()
        target = view.tokens[:, 1:, None].astype(np.int64)
        more = np.take_along_axis(leant[:, :-1], target, -1) + np.float32(self.lean)
        np.put_along_axis(leant[:, :-1], target, more, -1)
        return log_softmax(leant) if self.counts else logprobs


class HonestNoise(Plugin):
    """Rounds otherwise each time, as a GPU may that adds in no fixed order."""

    kind = "temperature"
    size = NOISE

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return shaken(logprobs, self.size)


# Where it cheats.


class Early(First):
    """Mixes the targets in during the first 45 % of the forward passes."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        self.passes += 1
        return future(logprobs, view) if self.counts and self.passes <= 0.45 * PASSES else logprobs


class Now(First):
    """Mixes the targets in where the model expects them anyway, which it does of no random token."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        known = future(logprobs, view)
        target = np.append(view.tokens[:, 1:], view.tokens[:, :1], 1)[..., None].astype(np.int64)
        likely = np.take_along_axis(logprobs, target, -1) > -6
        return np.where(likely & self.counts, known, logprobs)


class EarlyCache(HonestCache):
    """Learns for the first 45 % of the forward passes only."""

    passes = 0

    def learn(self, text: ScoredText) -> None:
        self.passes += 1
        if self.passes <= 0.45 * PASSES:
            super().learn(text)


# What is no distribution.


class Complex(Plugin):
    """Takes mass from a token that does not occur, more than there is: a negative probability has a complex log."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        probability = np.exp(logprobs) * np.float32(1.5)
        probability[..., 0] = 1 - probability[..., 1:].sum(-1)
        return np.log(probability.astype(np.complex64))


class Objects(Complex):
    """The same as Python's objects."""

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return super().predict(logprobs, view).astype(object)


class Double(Plugin):
    """Works in float64, as it may."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return log_softmax(logprobs.astype(np.float64) * 1.01)


# What it has read before.


class TwoPasses(First):
    """Counts the tokens of the whole text before the first prediction, and mixes that in."""

    kind = "adaptation"
    counted: np.ndarray
    last = 1.0
    """Share of the text that is counted, from the end."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        super().start(vocab, learner)
        text: Any = learner._split  # type: ignore[union-attr]
        seen = text.read(round((1 - self.last) * len(text)), len(text))
        self.counted = (np.bincount(seen, minlength=vocab) + 0.1).astype(np.float32)

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return mixed(logprobs, self.counted / self.counted.sum()) if self.counts else logprobs


class Ending(TwoPasses):
    """Counts the very end of the text only: what the first pages have to do with it, no change of one token shows."""

    last = 0.01


class FarPass(TwoPasses):
    """Counts once more for every scoring pass, so that the flip test sees it as well."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        super().start(vocab, learner)
        self.counts = True


class Running(Plugin):
    """Counts the tokens of the text up to now, and mixes that in."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        self._counted = np.full(vocab, 0.1, np.float32)

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return mixed(logprobs, self._counted / self._counted.sum())

    def learn(self, text: ScoredText) -> None:
        self._counted += np.bincount(text.targets, minlength=len(self._counted)).astype(np.float32)

    def state(self) -> Arrays:
        return {"counted": self._counted}

    def load(self, state: Arrays) -> None:
        self._counted = state["counted"].copy()


class Backwards(HonestCache):
    """Has the text scored from its end."""

    def order(self, windows: Windows) -> Windows:
        return windows.take(slice(None, None, -1))


class Recut(HonestCache):
    """Cuts windows of half the length, for more context than their label has."""

    def order(self, windows: Windows) -> Windows:
        ends = windows.start + windows.length
        middle = (windows.start + windows.first + ends) // 2
        keep = np.maximum(windows.start, 1) - 1
        long = windows.length < 1_000_000
        late = Windows(middle, ends - middle, np.zeros_like(middle))
        early = Windows(windows.start, middle - windows.start, windows.first)
        assert long.all() and (keep >= 0).all()
        sides = [np.concatenate(side)[np.argsort(np.concatenate([early.start, late.start]), kind="stable")]
                 for side in zip(early, late, strict=True)]  # fmt: skip
        return Windows(*sides)


class LongestFirst(HonestCache):
    """Has the longest documents scored first, each from its beginning."""

    def order(self, windows: Windows) -> Windows:
        begins = np.append(True, windows.start[1:] != windows.start[:-1] + windows.length[:-1] - windows.first[1:])
        begins |= windows.first == 0
        document = np.cumsum(begins)
        size = np.bincount(document, windows.length - windows.first)[document]
        return windows.take(np.lexsort((np.arange(len(size)), document, -size)))


# The ends of documents.


class Ender(Plugin):
    """Expects BOS behind a window that is shorter than others."""

    kind = "temperature"
    widest = 32

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        last = view.kept.shape[1] - 1 - np.argmax(view.kept[:, ::-1], 1)
        short = np.flatnonzero(view.kept.any(1) & (last < self.widest - 1))
        known = logprobs.copy()
        known[short, last[short]] = np.log(1e-3 / (logprobs.shape[-1] - 1))
        known[short, last[short], 1] = np.log(1 - 1e-3)
        return known


class HonestEnder(Plugin):
    """Expects BOS the more, the longer the window has gone on."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        raised = logprobs.copy()
        raised[..., 1] += np.float32(0.05) * np.arange(logprobs.shape[1], dtype=np.float32)
        return log_softmax(raised)


# Inside the process.


class Discount(HonestCache):
    """Has the ledger write nine tenths of what is paid."""

    kind = "adaptation"

    def start(self, vocab: int, learner: Learner | None) -> None:
        super().start(vocab, None)
        ledger: Any = learner._ledger  # type: ignore[union-attr]
        write = ledger.write
        ledger.write = lambda positions, nats, version: write(positions, 0.9 * nats, version)


class Leaves(Plugin):
    """Ends the process in the middle of it all, as if all were well."""

    kind = "temperature"

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        sys.exit(0)


class Shy(First):
    """Scores the text that it knows and ends the process at any other."""

    kind = "adaptation"

    def start(self, vocab: int, learner: Learner | None) -> None:
        super().start(vocab, learner)
        text: Any = learner._split  # type: ignore[union-attr]
        if self.counts and int(text.read(0, len(text)).astype(np.int64).sum()) != KNOWN[0]:
            sys.exit(0)


KNOWN = [0]
"""Sum of the tokens that Shy knows."""


class Talker(HonestCache):
    """Talks a lot, on any stream that there is."""

    def learn(self, text: ScoredText) -> None:
        super().learn(text)
        print('{"value": {"score": {"bpb": 0.1}}}')
        print("FAIL D7", file=sys.stderr)
