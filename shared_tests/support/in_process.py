"""Audits whose evaluation runs in this process, with an engine of numpy: quick.

They are blind for what a process of its own is there to see; what is in zoo_predictions.STARTED counts as the process.
"""

import contextlib
import dataclasses
import importlib
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from core.audit import auditor
from core.audit.watch import evaluation
from core.audit.watch.isolation import Isolated
from core.console import Console
from core.scoring.choices import parsed
from core.scoring.plugins import PLUGINS
from core.verbs.audit import Audit, _plan
from shared_tests.support import zoo_data, zoo_predictions
from shared_tests.support.predicted import HostPredictions

SEQ, BATCH = 32, 2
BOS = 1


@cache
def tables(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a token and the one before it say of the next one, (vocab, vocab) each."""
    dice = np.random.default_rng(0)
    return dice.standard_normal((vocab, vocab), np.float32), dice.standard_normal((vocab, vocab), np.float32)


class Tiny(HostPredictions):
    """An engine whose logits depend on the last two tokens of the document."""

    backend, device, dtype = "numpy", "CPU", "float32"

    def __init__(self, vocab: int) -> None:
        self.last, self.before = tables(vocab)

    def weights(self) -> dict[str, np.ndarray]:
        return {"last": self.last[:2]}

    def logits(self, tokens: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        first = np.zeros((len(tokens), 1), tokens.dtype) if before is None else before
        shifted = np.where(tokens == BOS, 0, np.concatenate([first, tokens[:, :-1]], 1))
        return self.last[tokens] + self.before[shifted]

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return Tape(self.logits(tokens), tokens).nll(targets)

    def start(self, rows: int) -> np.ndarray:
        return np.zeros((rows, 1), np.int32)

    def chunk(self, state: np.ndarray, tokens: np.ndarray) -> "Tape":
        return Tape(self.logits(tokens, state), tokens)

    def commit(self, tape: "Tape", n: int) -> np.ndarray:
        return tape.tokens[:, n - 1 : n]


class Tape(NamedTuple):
    """A chunk that was run."""

    values: np.ndarray
    tokens: np.ndarray

    def logits(self) -> np.ndarray:
        return self.values

    def nll(self, targets: np.ndarray) -> np.ndarray:
        shifted = self.values - self.values.max(-1, keepdims=True)
        target = np.take_along_axis(shifted, targets[..., None].astype(np.int64), -1)[..., 0]
        return np.log(np.exp(shifted).sum(-1)) - target


def run_here(function: str, arguments: dict[str, Any], **isolation: Any) -> Isolated:
    """Call `function` as core.audit.watch.isolation.run_isolated does, without the isolation."""
    zoo_predictions.STARTED.clear()
    module, _, name = function.partition(":")
    value: Any = None
    error: dict[str, str] | None = None
    try:
        value = getattr(importlib.import_module(module), name)(**arguments)
    except BaseException as raised:
        kind = f"{type(raised).__module__}.{type(raised).__qualname__}"
        error = {"kind": kind, "message": str(raised), "traceback": traceback.format_exc()}
    return Isolated(value, error, 0.1, [], [], [], {}, [], ["any isolation: a test"], 0)


@dataclasses.dataclass
class Place:
    """A text of about 1,000 tokens in 8 documents, and an artifact whose engine is a `Tiny`."""

    data: str
    model: str

    def plan(self, out: Path, *plugins: str, **options: Any) -> Any:
        """Return the plan of an audit with plug-ins of zoo_predictions and other options of `skc audit`."""
        ours = "shared_tests.support.zoo_predictions:"
        names = tuple(n if ":" in n or parsed(n)[0] in PLUGINS else f"{ours}{n}" for n in plugins)
        given: dict[str, Any] = {"data": self.data, "seq": SEQ, "batch": BATCH, "flips": 2, "backend": "cuda"}
        given |= {"plugins": names or None, "out": str(out)} | options
        return _plan(Audit(path=self.model, **given))

    def audit(self, out: Path, *plugins: str, **options: Any) -> auditor.AuditResult:
        """Audit and return what was found."""
        return auditor.audit(self.plan(out, *plugins, **options), Console(as_json=True))


@contextlib.contextmanager
def made(folder: Path) -> Iterator[Place]:
    """Make the place, and let audits call their evaluations here as long as it is used."""
    data = zoo_data.write_data(folder, zoo_data.novels("train", 6, 500), zoo_data.novels("val", 8, 300))
    config = zoo_data.small(data)
    model = zoo_data.write_model(folder / "model.skc", config, zoo_data.half_weights(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditor, "run_isolated", run_here)
        patch.setattr(evaluation, "load_engine", lambda backend, settings, *_: Tiny(settings.model.vocab))
        yield Place(data, model)


def verdicts(found: auditor.AuditResult, verdict: str) -> dict[str, str]:
    """Return rule -> evidence of the findings with a verdict."""
    return {f.rule: f.evidence for f in found.findings if f.verdict == verdict}
