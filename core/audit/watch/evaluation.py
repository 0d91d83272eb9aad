"""The evaluation that is audited: what runs in the watched process, from the artifact's bytes to the last number."""

import dataclasses
import hashlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.audit.fingerprints import ROUNDING, Fingerprints
from core.audit.flips import PASSES, flip_test
from core.config import ConfigError, RunConfig, from_json
from core.console import Console
from core.data.dataset import Dataset, open_dataset
from core.engine.loading import load_engine
from core.engine.protocol import Engine, EngineOptions
from core.export.artifact import read_artifact
from core.scoring.evaluation import Evaluation
from core.scoring.key import evaluation_key
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import View, plugin_kinds
from core.scoring.score import score, score_sample

SAMPLED = 16
"""Forward passes whose whole distribution is looked at, about."""
NORMAL = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-4, "float16": 1e-4}
"""How far the logarithm of a sum of probabilities may be from 0, by compute type (log-probabilities are float32)."""
AGREE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""How far the cost that is written may be from that distribution's, in nats: two ways to compute the same logits."""


class LastPassDone(Exception):
    """The last forward pass that was asked for is done."""


class Distributions:
    """Looks at the distributions that were scored, on some of the passes, and keeps what identifies predictions."""

    def __init__(self, share: float, passes: int | None, stop: int | None, prints: Fingerprints) -> None:
        self._share, self._passes, self._stop, self.prints = share, passes, stop, prints
        self.seconds = 0.0
        self.passes = self.positions = 0
        self.sum = self.cost = 0.0
        """Largest distance from 0 of a log-sum over the vocabulary, and of a cost from that distribution's."""
        self.worst = 0.0
        """The log-sum that is furthest from 0."""

    def wants(self, number: int) -> bool:
        """Take the first `passes` (None: all) for the prints, and a random share of all, which nobody can know."""
        if self._stop is not None and number > self._stop:
            raise LastPassDone
        self._printed = self._passes is None or number <= self._passes
        self._summed = number == 1 or secrets.randbelow(1 << 20) < self._share * (1 << 20)
        return self._printed or self._summed

    def see(self, view: View, targets: np.ndarray, nats: np.ndarray, logprobs: np.ndarray) -> None:
        """Add up the probabilities of every kept position."""
        began = time.monotonic()
        if self._printed:
            self.prints.see(view, targets, nats, logprobs)
        if self._summed:
            self._add(view, targets, nats, logprobs)
        self.seconds += time.monotonic() - began

    def _add(self, view: View, targets: np.ndarray, nats: np.ndarray, logprobs: np.ndarray) -> None:
        rows = logprobs[view.kept]
        highest = rows.max(-1, keepdims=True)
        total = np.log(np.exp(rows - highest).sum(-1, dtype=np.float64)) + highest[:, 0]
        of_target = -np.take_along_axis(rows, targets[view.kept][:, None].astype(np.int64), -1)[:, 0]
        worst = int(np.argmax(np.abs(np.nan_to_num(total, nan=np.inf))))
        if abs(total[worst]) >= self.sum or not np.isfinite(total[worst]):
            self.sum, self.worst = float(abs(total[worst])), float(total[worst])
        self.cost = max(self.cost, float(np.abs(nats[view.kept] - of_target).max()))
        self.passes += 1
        self.positions += len(rows)


@dataclass(frozen=True)
class AuditOrder:
    """What an audited evaluation is to do, in plain JSON values."""

    artifact: str
    data: str
    """Prepared folder."""
    config: dict[str, Any]
    backend: str
    dtype: str | None
    ledger: str
    predictions: str
    """Where checksums of what was predicted go."""
    stop: int | None
    """The last forward pass; None: all."""
    places: tuple[int, ...]
    """Targets whose whole distributions go there too."""
    secret: str
    """Goes into the name of the ledger, so that one from elsewhere is not taken."""
    started: float
    """time.monotonic() before the process was started."""
    documents: int | None
    """Score only the first so many; None: all."""
    flips: int
    """0 leaves the flip test out."""
    seed: int


def audited(**fields: Any) -> dict[str, Any]:
    """Score an artifact as an AuditOrder of these fields says and return what was seen, as plain JSON values."""
    order, say = AuditOrder(**fields), Console(as_json=True)
    model_file = read_artifact(order.artifact)
    settings = dataclasses.replace(from_json(RunConfig, order.config), model=model_file.model)
    dataset = open_dataset(order.data, train=False)
    if order.documents is not None:
        dataset = dataclasses.replace(dataset, val=dataset.val.documents(order.documents))
    if dataset.tokenizer.sha256 != model_file.tokenizer_sha256:
        words = f"{order.artifact} was made with another tokenizer than {order.data}"
        raise ConfigError(f"{words}: give its data with --data PATH")
    options = EngineOptions(dtype=order.dtype)  # type: ignore[arg-type]
    engine = load_engine(order.backend, settings, model_file.weights, options)
    value: dict[str, Any] = {"backend": engine.backend, "device": engine.device, "dtype": engine.dtype}
    value["plugins"] = plugin_kinds(settings.eval.plugins)
    value["prepared"] = time.monotonic() - order.started
    name = f"{order.secret} {evaluation_key(engine, dataset, settings, plugins=True)}"
    key = hashlib.sha256(name.encode()).hexdigest()
    prints = Fingerprints(len(dataset.val), order.places)
    value |= _score(engine, dataset, settings, Path(order.ledger), key, prints, order.stop, say)
    prints.save(Path(order.predictions))
    value["clock"] = time.monotonic() - order.started
    if order.flips:
        bound, progress = ROUNDING[engine.dtype], say.progress("flip test")
        value["flips"] = flip_test(engine, dataset.val, settings, order.flips, order.seed, bound, progress)
    return value


def _score(
    engine: Engine, dataset: Dataset, config: RunConfig, path: Path, key: str, prints: Fingerprints, stop: int | None,
    say: Console,
) -> dict[str, Any]:  # fmt: skip
    """Score the text and return the score, or the rule that was broken, and what the distributions say."""
    settings, learns = config.eval, config.eval.learns
    total = len(dataset.val) // (settings.batch * (settings.stride or settings.seq)) + 1
    watch = Distributions(SAMPLED / total, None if learns else PASSES, stop, prints)
    book = Ledger.open(path, len(dataset.val), key, anew=True)
    value: dict[str, Any] = {"resumed": book.writes, "broken": None, "score": None, "continued": None}
    evaluation = Evaluation.of(dataset.val, config, plugins=True)
    try:
        if book.writes and not learns:
            value["continued"] = _rescored(engine, evaluation, book)
        value["score"] = score(engine, evaluation, book, watch=watch, progress=say.progress("scoring")).to_json()
    except LastPassDone:
        pass
    except LedgerError as error:
        if error.rule is None:
            raise
        value["broken"] = {"rule": error.rule, "message": str(error)}
    finally:
        book.close()
    value["watching"] = watch.seconds
    value["distributions"] = {
        "passes": watch.passes, "positions": watch.positions, "vocabulary": dataset.tokenizer.vocab,
        "largest_log_sum": watch.worst if np.isfinite(watch.worst) else None, "largest_cost_gap": watch.cost,
        "normal": watch.sum <= NORMAL[engine.dtype], "agrees": watch.cost <= AGREE[engine.dtype],
        "limit": NORMAL[engine.dtype],
    }  # fmt: skip
    return value


def _rescored(engine: Engine, evaluation: Evaluation, book: Ledger) -> dict[str, Any]:
    """Score a sample of what an earlier start wrote again; LedgerError if the ledger holds something else.

    The draw is this process's: an edit of a share s of the passes stays unseen with a probability of (1 - s)^SAMPLED.
    """
    sample = score_sample(engine, evaluation, book, SAMPLED, np.random.default_rng(secrets.randbits(128)))
    both = (sample.entries["order"] > 0) & (book.entries["order"] > 0)
    gaps = np.where(both, np.abs(sample.entries["nats"] - book.entries["nats"]), 0.0)
    if gaps.max() > AGREE[engine.dtype]:
        place = int(np.argmax(gaps))
        ours, left = sample.entries["nats"][place], book.entries["nats"][place]
        words = f"target {place + 1} costs {left:.6f} nats in the ledger of the killed start, scored again {ours:.6f}"
        raise LedgerError(f"{words}: that ledger is not of this evaluation", "D8")
    return {"targets": int(both.sum()), "largest_gap": float(gaps.max())}
