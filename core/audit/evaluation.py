"""The evaluation that is audited: what runs in the watched process, from the artifact's bytes to the last number."""

import dataclasses
import hashlib
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np

from core.audit.again import start_length
from core.audit.flips import Predictions, Prints, first_inputs, flip_test
from core.bundled import open_data
from core.config import ConfigError, RunConfig, from_json
from core.console import Console
from core.data import Dataset
from core.engine import Engine, EngineOptions, load_engine
from core.export.artifact import read_artifact
from core.scoring import score
from core.scoring.key import evaluation_key
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import View, load_plugins, plugin_kinds

SAMPLED = 16
"""Forward passes whose whole distribution is looked at, about."""
NORMAL = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-4}
"""How far the logarithm of a sum of probabilities may be from 0, by compute type (log-probabilities are float32)."""
AGREE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2}
"""How far the cost that is written may be from that distribution's, in nats: two ways to compute the same logits."""


class Distributions:
    """Looks at the distributions that were scored, on some of the passes, and keeps the predictions of the first."""

    def __init__(self, share: float, passes: int, tokens: int) -> None:
        self._share, self._passes, self.prints = share, passes, Prints(tokens)
        self.seconds = 0.0
        self.passes = self.positions = 0
        self.sum = self.cost = 0.0
        """Largest distance from 0 of a log-sum over the vocabulary, and of a cost from that distribution's."""
        self.worst = 0.0
        """The log-sum that is furthest from 0."""

    def wants(self, number: int) -> bool:
        """Take the first passes and a random share of those after them, which nobody can know before."""
        self._number = number
        return number <= self._passes or secrets.randbelow(1 << 20) < self._share * (1 << 20)

    def see(self, view: View, targets: np.ndarray, nats: np.ndarray, logprobs: np.ndarray) -> None:
        """Add up the probabilities of every kept position."""
        began = time.monotonic()
        kept = logprobs[view.kept]
        highest = kept.max(-1, keepdims=True)
        total = np.log(np.exp(kept - highest).sum(-1, dtype=np.float64)) + highest[:, 0]
        of_target = -np.take_along_axis(kept, targets[view.kept][:, None].astype(np.int64), -1)[:, 0]
        worst = int(np.argmax(np.abs(np.nan_to_num(total, nan=np.inf))))
        if abs(total[worst]) >= self.sum or not np.isfinite(total[worst]):
            self.sum, self.worst = float(abs(total[worst])), float(total[worst])
        self.cost = max(self.cost, float(np.abs(nats[view.kept] - of_target).max()))
        self.passes += 1
        self.positions += len(kept)
        if self._number <= self._passes:
            self.prints.see(view, targets, nats, logprobs)
        self.seconds += time.monotonic() - began


def audited(
    artifact: str,
    data: str,
    config: dict[str, Any],
    backend: str,
    dtype: str | None,
    ledger: str,
    predictions: str,
    passes: int,
    secret: str,
    started: float,
    documents: int | None,
    flips: int,
    seed: int,
) -> dict[str, Any]:
    """Score an artifact and return what was seen, as plain JSON values.

    `predictions`: where the predictions of the first `passes` go; `secret`: goes into the name of the ledger, so that
    one from elsewhere is not taken; `started`: time.monotonic() before the process was started; `documents`: score only
    the first so many, None: all; `flips`: 0 leaves the flip test out.
    """
    say = Console(as_json=True)
    found = read_artifact(artifact)
    settings = dataclasses.replace(from_json(RunConfig, config), model=found.model)
    whole = open_data(data, train=False)
    dataset = whole if documents is None else dataclasses.replace(whole, val=whole.val.documents(documents))
    if dataset.tokenizer.sha256 != found.tokenizer_sha256:
        raise ConfigError(f"{artifact} was made with another tokenizer than {data}: give its data with --data PATH")
    options = EngineOptions(dtype=dtype)  # type: ignore[arg-type]
    engine = load_engine(backend, settings, found.weights, options)
    value: dict[str, Any] = {"backend": engine.backend, "device": engine.device, "dtype": engine.dtype}
    value["plugins"] = plugin_kinds(settings.eval.plugins)
    value["prepared"] = time.monotonic() - started
    key = hashlib.sha256(f"{secret} {evaluation_key(engine, dataset, settings, plugins=True)}".encode()).hexdigest()
    value |= _score(engine, dataset, settings, Path(ledger), key, Path(predictions), passes, say)
    value["clock"] = time.monotonic() - started
    if not flips:
        return value
    value["flips"] = flip_test(engine, dataset.val, settings, flips, seed, say.progress("flip test"))
    return value


def _score(
    engine: Engine,
    dataset: Dataset,
    config: RunConfig,
    path: Path,
    key: str,
    predictions: Path,
    passes: int,
    say: Console,
) -> dict[str, Any]:
    """Score the text and return the score, or the rule that was broken, and what ledger and distributions say."""
    settings = config.eval
    total = len(dataset.val) // (settings.batch * (settings.stride or settings.seq)) + 1
    start = start_length(config, len(dataset.val), passes)
    watch = Distributions(SAMPLED / total, passes, start)
    book = Ledger.open(path, len(dataset.val), key, anew=True)
    resumed = book.writes
    value: dict[str, Any] = {"resumed": resumed, "broken": None, "score": None}
    try:
        done = score(
            engine, dataset, settings, documents=None, seed=settings.seed, progress=say.progress("scoring"),
            ledger=book, isolated=config.model.documents == "isolated", watch=watch,
            plugins=load_plugins(settings.plugins),
        )  # fmt: skip
        value["score"] = done.to_json()
    except LedgerError as error:
        if error.rule is None:
            raise
        value["broken"] = {"rule": error.rule, "message": str(error)}
    finally:
        value["ledger"] = _order(book.entries)
        _save_predictions(predictions, watch.prints, book.entries, dataset, config)
        book.close()
    value["watching"] = watch.seconds
    value["distributions"] = {
        "passes": watch.passes, "positions": watch.positions, "vocabulary": dataset.tokenizer.vocab,
        "largest_log_sum": watch.worst if np.isfinite(watch.worst) else None, "largest_cost_gap": watch.cost,
        "normal": watch.sum <= NORMAL[engine.dtype], "agrees": watch.cost <= AGREE[engine.dtype],
        "limit": NORMAL[engine.dtype],
    }  # fmt: skip
    return value


def _save_predictions(path: Path, prints: Prints, entries: np.ndarray, dataset: Dataset, config: RunConfig) -> None:
    """Write what the first passes predicted, for the parent to compare."""
    count = len(prints.predicted)
    order = np.where(prints.first_input >= 0, np.append(0, entries["order"][: count - 1]), 0)
    firsts = first_inputs(prints.first_input, dataset.val, config)
    Predictions(prints.predicted, order, firsts, np.append(0.0, entries["nats"][: count - 1])).save(path)


def _order(entries: np.ndarray) -> dict[str, Any]:
    """Return what the ledger says about the order of scoring."""
    order, version = entries["order"], entries["version"]
    written = order > 0
    by_order = np.argsort(order[written], kind="stable")
    return {
        "targets": len(entries),
        "written": int(written.sum()),
        "writes": int(order.max(initial=0)),
        "versions": int(version[written].max(initial=0)) + 1,
        "versions_rise": bool((np.diff(version[written][by_order]) >= 0).all()),
        "left_to_right": bool((np.diff(order[written]) >= 0).all()),
    }
