"""Plug-ins: what may change predictions while a text is scored, on nothing but what has been scored already.

A plug-in of the user's sees the windows that come next before they are scored (their inputs; the inputs of a window
include the targets before each position, and it must not look further), may change the predictions, and learns from the
targets after they are in the ledger. What it does with that is audited (`skc audit`), not trusted. Those that are built
in work on the device (predictions.py).
"""

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np

from core.config import ConfigError, from_json, require, to_json
from core.data.batch import Batch
from core.data.dataset import Split
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, Engine, StepResult
from core.scoring.choices import parsed, settings_of
from core.scoring.counts import Counts
from core.scoring.ledger import Ledger, LedgerError, Scored
from core.scoring.predictions import Predictor, Temperature
from core.scoring.predictions import View as View
from core.scoring.windows import Windows

Kind = Literal["temperature", "cache", "adaptation"]


class ScoredText(NamedTuple):
    """Targets that are in the ledger now: what `Plugin.learn` gets."""

    ranges: tuple[Scored, ...]
    """Their places in the stream, for `Learner.train`."""
    view: View
    row: np.ndarray  # (count,) int64: where each target is in the view
    column: np.ndarray  # (count,) int64
    targets: np.ndarray  # (count,) int32
    nats: np.ndarray  # (count,) float64: what each cost


class Learner:
    """The weights, as a plug-in of kind `adaptation` may change them: by training on text that is in the ledger.

    The optimizer begins with no memory: that of the training run is in no artifact.
    """

    def __init__(self, engine: Any, split: Split, ledger: Ledger) -> None:
        self._engine, self._split, self._ledger = cast(Engine, engine), split, ledger
        self._before: tuple[Arrays, Arrays, bool] | None = None
        self.version = 0
        """Version of the weights: how often they were changed."""

    def train(self, ranges: Sequence[Scored], plan: StepPlan) -> StepResult:
        """Take one optimizer step on scored ranges of equal length, one row each (their inputs are one token earlier).

        LedgerError if one of them was not scored.
        """
        for one in ranges:
            self._ledger.nats(one)
        if len({one.stop - one.start for one in ranges}) != 1:
            raise LedgerError("train on at least one range, and on ranges of one length")
        self._keep()
        rows = np.stack([self._split.read(one.start - 1, one.stop) for one in ranges])
        batch = Batch(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]))
        done = self._engine.train_step(batch, plan).result()
        self.version += 1
        return done

    def reset(self) -> None:
        """Put the weights back as they were before the first `train`, as a new version; the optimizer forgets."""
        if self._before is not None:
            self._load(*self._before)
            self._forget()
            self.version += 1

    def close(self) -> None:
        """Put weights and optimizer back: the evaluation is over."""
        if self._before is not None:
            self._load(*self._before)

    def state(self) -> Arrays:
        """Return what an interrupted evaluation needs to go on."""
        if self._before is None:
            return {}
        sides = {"param": self._engine.params(), "optim": self._engine.optimizer()}
        arrays = {f"{side}.{name}": value for side, part in sides.items() for name, value in part.items()}
        return {**arrays, "quantise": np.array([self._engine.quantise])}

    def load(self, state: Arrays, version: int) -> None:
        """Go on from `state`."""
        self.version = version
        if state:
            self._keep()
            params, optim = ({n[6:]: v for n, v in state.items() if n[:6] == f"{s}."} for s in ("param", "optim"))
            self._load(params, optim, bool(state["quantise"][0]))

    def _keep(self) -> None:
        if self._before is None:
            self._before = self._engine.params(), self._engine.optimizer(), self._engine.quantise
            self._forget()

    def _forget(self) -> None:
        """Leave of the optimizer the running averages alone: they are weights."""
        state = self._engine.optimizer()
        empty = {name: v if name.endswith(".ema") else np.zeros_like(v) for name, v in state.items()}
        self._engine.load_optimizer(empty)

    def _load(self, params: Arrays, optimizer: Arrays, quantise: bool) -> None:
        self._engine.load_params(params, quantise)
        self._engine.load_optimizer(optimizer)


class Plugin:
    """What a plug-in of the user's is; each of its methods may be replaced. One object serves one scoring pass.

    It changes whole log-probabilities on the host, after whatever is built in, and where it is rank 0 works alone.
    """

    kind: ClassVar[Kind] = "cache"
    Settings: ClassVar[type | None] = None
    """A frozen dataclass whose fields have defaults: the class is made with one. None: it is made with nothing."""

    def start(self, vocab: int, learner: Learner | None) -> None:
        """Begin a scoring pass; the weights are there for kind `adaptation` only."""

    def order(self, windows: Windows) -> Windows:
        """Return the windows in the order in which they are to be scored: documents may change places, no more."""
        return windows

    def predict(self, logprobs: np.ndarray, view: View) -> np.ndarray:
        """Return log-probabilities for the next token of every position: (rows, seq, V), float32 or float64, finite."""
        return logprobs

    def learn(self, text: ScoredText) -> None:
        """Take note of targets that have been scored, those of the last `predict`."""

    def state(self) -> Arrays:
        """Return what was learned, so that a killed evaluation can go on; weights are not part of it."""
        return {}

    def load(self, state: Arrays) -> None:
        """Take back what `state` returned."""


PLUGINS: dict[str, type[Predictor]] = {"temperature": Temperature, "counts": Counts}
"""Plug-ins by the name that eval.plugins knows them by; others are named as package.module:Class."""


def load_plugins(choices: Sequence[str], strangers: bool = True) -> list[Plugin | Predictor]:
    """Make the plug-ins of eval.plugins; ConfigError for one that is not there, or a setting that it does not have.

    Without `strangers` those that are not ours are left out: making them would run their code.
    """
    plugins = []
    for name, given in settings_of(choices).items():
        if ":" in name and not strangers:
            continue
        kind, where = _find(name), f"eval.plugins.{name}"
        if kind.Settings is None:
            require(not given, f"{where} has no settings, but {', '.join(given)} was given")
            plugins.append(kind())
        else:
            settings = from_json(kind.Settings, {**to_json(kind.Settings()), **given}, where)
            plugins.append(kind(settings))  # type: ignore[call-arg]
    return plugins


def plugin_kinds(choices: Sequence[str]) -> dict[str, Kind]:
    """Return choice -> kind of the plug-ins of eval.plugins, none of which is made; ConfigError for an unknown one."""
    return {choice: _find(parsed(choice)[0]).kind for choice in choices}


def foreign(choices: Sequence[str]) -> list[str]:
    """Return the plug-ins that are not ours: importing them runs code that a file or a command line names."""
    return [choice for choice in choices if parsed(choice)[0] not in PLUGINS]


def _find(name: str) -> type[Plugin | Predictor]:
    if name in PLUGINS:
        return PLUGINS[name]
    module, _, cls = name.partition(":")
    if not (module and cls) or module.startswith("."):
        close = difflib.get_close_matches(name, PLUGINS, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(PLUGINS)}"
        raise ConfigError(f"eval.plugins: {name!r} is not a plug-in; {hint} (your own: package.module:Class)")
    try:
        plugin = getattr(importlib.import_module(module), cls, None)
    except ImportError as error:
        raise ConfigError(
            f"eval.plugins: {name!r}: {error}; it is looked for on PYTHONPATH, not in the current folder"
        ) from error
    if not (isinstance(plugin, type) and issubclass(plugin, Plugin | Predictor)):
        raise ConfigError(
            f"eval.plugins: {name!r} is not a class that extends core.scoring.plugins.Plugin, or "
            "core.scoring.predictions.Predictor"
        )
    return plugin


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of (..., V) logits, in their type; sums are taken in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(shifted.dtype)
