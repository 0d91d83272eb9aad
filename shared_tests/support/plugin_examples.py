"""Plug-ins and engines that tests use: an honest adaptation, and a process that kills itself."""

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import rng
from core.config import EvalConfig, RunConfig, TrainConfig
from core.engine.protocol import Arrays, Engine
from core.scoring import snapshots
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.plugins import Learner, Plugin, ScoredText, View, log_softmax
from core.scoring.predictions import Predictor
from core.scoring.score import Score, score, score_text
from core.scoring.windows import Windows
from core.training import schedule
from shared_tests.support.harness import engine, mini, working_weights
from shared_tests.support.killed import fix_threads
from shared_tests.support.known_scores import BOS, VOCAB, FakeSplit, make_dataset
from shared_tests.support.predicted import HostPredictions
from shared_tests.support.zoo_honest import HonestCache

TRAIN = TrainConfig(
    steps=100, batch=1, seq=64, warmup=0.0, warmdown=0.0, lr_embed=1e-3, lr_matrix=1e-3, lr_vector=1e-3, lr_hash=1e-3
)


class Adaptation(Plugin):
    """Takes one optimizer step on every scored range of `length` targets."""

    kind = "adaptation"

    def __init__(self, length: int = TRAIN.seq, quantise: bool = False) -> None:
        self._length, self._quantise = length, quantise
        self.steps = 0

    def start(self, vocab: int, learner: Learner | None) -> None:
        assert learner is not None
        self._learner = learner

    def learn(self, text: ScoredText) -> None:
        for one in text.ranges:
            if one.stop - one.start == self._length:
                plan = dataclasses.replace(schedule.plan(self.steps, 0.5, TRAIN), quantise=self._quantise)
                assert self._learner.train([one], plan).finite
                self.steps += 1

    def state(self) -> Arrays:
        return {"steps": np.array([self.steps])}

    def load(self, state: Arrays) -> None:
        self.steps = int(state["steps"][0])


class Killed(Exception):
    """What a test kills an evaluation with."""


class Counted(HonestCache):
    """Counts the passes that were computed."""

    def __init__(self) -> None:
        self.passes = 0

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        self.passes += 1
        return super().predict(logprobs, view)


class Dies(Plugin):
    """Kills the evaluation after the write of its N-th pass, before (it comes first) anything has learned from it."""

    def __init__(self, count: int) -> None:
        self._left = count

    def learn(self, text: ScoredText) -> None:
        self._left -= 1
        if self._left == 0:
            raise Killed


class Resets(Adaptation):
    """Forgets before every text what it learned from the last one."""

    def learn(self, text: ScoredText) -> None:
        self._learner.reset()
        super().learn(text)


class Ordered(Plugin):
    """Gives the windows another order."""

    def __init__(self, change: Callable[[Windows], Windows]) -> None:
        self._change = change

    def order(self, windows: Windows) -> Windows:
        return self._change(windows)


class Predicts(Plugin):
    """Makes something else of the predictions."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self._change = change

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        return self._change(logprobs)


class Costs(Plugin):
    """Takes note of what it is told."""

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []

    def learn(self, text: ScoredText) -> None:
        self.told.append(text.nats)


class Markov(HostPredictions):
    """An engine that knows the source of the text, but whose logits are `k` times its log-probabilities."""

    def __init__(self, k: float = 1.0) -> None:
        scores = 1.5 * rng.normal(0, "plugins/source", VOCAB * VOCAB).reshape(VOCAB, VOCAB)
        scores[:, [0, 2, 3]] = -30.0  # padding, end and unknown do not occur
        self.table = log_softmax(scores)
        self.k = k

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return (self.k * self.table[tokens]).astype(np.float32)

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return -np.take_along_axis(log_softmax(self.k * self.table[tokens]), targets[..., None], -1)[..., 0]

    def text(self, count: int) -> Any:
        """Return a text of the source."""
        edges = np.cumsum(np.exp(self.table), -1)
        drawn = (rng.integers16(0, "plugins/text", count) + 0.5) / 65536
        tokens = [BOS]
        for u in drawn:
            tokens.append(min(int(np.searchsorted(edges[tokens[-1]], u)), VOCAB - 1))
        dataset = make_dataset([5], raw=False)
        dataset.val = FakeSplit(np.array(tokens), None, 0, dataset.tokenizer)
        return dataset


SHORT = [5, 40, 1, 17, 16, 2, 33, 20]
LENGTHS = [5, 40, 1, 17, 16, 2, 33, 90, 3, 1, 70, 31, 33]

CUTS = {
    "plain": ({"batch": 2}, 32),
    "sliding": ({"windows": "sliding", "stride": 8, "batch": 3}, 24),
    "documents": ({"windows": "documents", "batch": 2}, 17),
    "stateful": ({"windows": "stateful", "batch": 4}, 0),
}
"""Options of each kind of windows, and the length of the ranges that are trained on."""


def config(**changes: Any) -> EvalConfig:
    """Return settings with some plug-in; what is built in learns after every turn."""
    return EvalConfig(**{"seq": 16, "batch": 4, "plugins": ("x",), "round": 1, **changes})


def run(engine: Any, dataset: Any, plugins: Sequence[Plugin | Predictor], **changes: Any) -> tuple[Score, np.ndarray]:
    """Return the score and the entries of its ledger."""
    book = Ledger(len(dataset.val))
    found = score(engine, Evaluation(dataset.val, config(**changes), plugins=bool(plugins)), book, plugins=plugins)
    return found, book.entries


def small(name: str = "skc_mac", length: int = TRAIN.seq) -> RunConfig:
    """Return the mini of a preset with the vocabulary of `make_dataset`, that trains on one row of `length` tokens."""
    config = mini(name)
    train = dataclasses.replace(config.train, batch=1, seq=length, micro_batch=None)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=VOCAB), train=train)


def fresh(backend: str, config: RunConfig, dtype: str = "float32") -> Engine:
    """Return an engine whose weights work, always the same."""
    return engine(backend, config, working_weights(config.model, 2.0), dtype=dtype)


def held(model: Engine) -> dict[str, bytes]:
    """Return everything that an engine holds, and what it predicts."""
    text = make_dataset(SHORT).val.tokens[None, :17]
    sides = {"params": model.params(), "optimizer": model.optimizer(), "weights": model.weights()}
    arrays = {f"{side}/{name}": value.tobytes() for side, part in sides.items() for name, value in part.items()}
    scores = {"nll": model.nll(text[:, :-1], text[:, 1:]).tobytes(), "logits": model.logits(text).tobytes()}
    return {**arrays, **scores, "quantise": bytes([model.quantise])}


def child(path: str, place: str, count: str) -> None:
    """Score the text of LENGTHS with cache and adaptation into the ledger at `path`, and get killed.

    `place` learn: between the `count`-th write and what is learned from it; rename: just before a copy of what was
    learned gets its name; progress: after a pass.
    """
    fix_threads("mlx")
    snapshots.SNAPSHOT_EVERY = 0.0
    dataset, settings = make_dataset(LENGTHS), EvalConfig(seq=16, batch=4)
    book = Ledger.open(Path(path), len(dataset.val), "key")
    replace, visits = os.replace, itertools.count(1)

    def visit(here: str) -> None:
        if here == place and next(visits) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    def renamed(source: str, target: Path) -> None:
        visit("rename")
        replace(source, target)

    class Visits(Plugin):
        def learn(self, text: ScoredText) -> None:
            visit("learn")

    os.replace = renamed
    score_text(
        fresh("mlx", small("debug")), Evaluation(dataset.val, settings, plugins=True), book,
        plugins=[Visits(), HonestCache(), Adaptation()], progress=lambda done, total: visit("progress"),
    )  # fmt: skip
