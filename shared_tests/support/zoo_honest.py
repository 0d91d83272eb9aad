"""Honest plug-ins that look like cheats: near-misses for the auditor, named and run like those of zoo.py."""

import numpy as np

from core.config import TrainConfig
from core.engine.protocol import Arrays
from core.scoring.ledger import Scored
from core.scoring.plugins import Learner, Plugin, ScoredText, View
from core.training import schedule

ROW = 256
"""Targets that one forward pass scores, and tokens of a row that is trained on."""
PLAN = schedule.plan(0, 0.5, TrainConfig(warmup=0.0, warmdown=0.0, lr_embed=1e-3, lr_matrix=1e-3, lr_vector=1e-3))


class HonestCache(Plugin):
    """Mixes in which tokens followed the last one, counted after they were scored."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        assert learner is None, "the weights are for adaptations only"
        self._counts = np.zeros((vocab, vocab), np.float32)

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        counts = self._counts[view.tokens] + np.float32(1 / logprobs.shape[-1])
        return mixed(logprobs, counts / counts.sum(-1, keepdims=True))

    def learn(self, text: ScoredText) -> None:
        np.add.at(self._counts, (text.view.tokens[text.row, text.column], text.targets), 1)

    def state(self) -> Arrays:
        return {"counts": self._counts}

    def load(self, state: Arrays) -> None:
        self._counts = state["counts"].copy()


class HonestTraining(Plugin):
    """Takes an optimizer step on every ROW targets that were scored."""

    kind = "adaptation"

    def start(self, vocab: int, learner: Learner | None) -> None:
        assert learner is not None
        self._learner = learner
        self._last: Scored | None = None

    def learn(self, text: ScoredText) -> None:
        for one in text.ranges:
            if one.stop - one.start == ROW:
                self._last = one
                assert self._learner.train([one], PLAN).finite


def mixed(logprobs: np.ndarray, other: np.ndarray, weight: float = 0.1) -> np.ndarray:
    """Return the logarithm of (1 - weight) * model + weight * other."""
    return np.log((1 - weight) * np.exp(logprobs) + weight * other).astype(logprobs.dtype)
