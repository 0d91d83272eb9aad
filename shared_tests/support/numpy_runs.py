"""A numpy model that really learns, and runs of it: what tests of the loop and the run folder train."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import presets
from core.config import RunConfig
from core.data.batch import Batch
from core.data.dataset import Dataset
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, StepResult
from core.engine.ranks import Alone
from core.model.params import start_values
from core.model.storage import Stored
from core.training.loop import train
from core.training.run import Run


class Done:
    """A finished step."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class BigramEngine:
    """logits = E[token] @ E.T + bias, with hand-made gradients and AdamW; the other parameters rest."""

    backend, device, notes, quantise = "numpy", "CPU", (), False
    ranks = Alone()

    def __init__(
        self, config: RunConfig, bad_step: int | None = None, stop_step: int | None = None,
        hang_step: int | None = None, overflows: Sequence[int] = (), dtype: str = "float32",
    ):  # fmt: skip
        self.config, self.bad_step, self.stop_step, self.hang_step = config, bad_step, stop_step, hang_step
        self.overflows, self.dtype = overflows, dtype
        self.values = start_values(config.model, config.seed)
        self.state = {f"{n}.{slot}": np.zeros_like(w) for n, w in self.values.items() for slot in ("m", "v")}
        self.started: list[int] = []

    def train_step(self, batch: Batch, plan: StepPlan) -> Done:
        self.started.append(plan.step)
        if plan.step == self.hang_step and len(self.started) > 1:  # until somebody kills the process
            time.sleep(600)
        if plan.step == self.stop_step and len(self.started) > 1:  # not in the warm-up
            raise KeyboardInterrupt
        if plan.step == self.bad_step and len(self.started) > 1:
            return Done(StepResult(float("nan"), float("nan"), False))
        loss, grads = self._gradient(batch)
        if plan.step in self.overflows and len(self.started) > 1:
            return Done(StepResult(loss, float("inf"), False))
        for name, g in grads.items():
            m, v = self.state[f"{name}.m"], self.state[f"{name}.v"]
            m += (1 - self.config.train.beta1) * (g - m)
            v += (1 - self.config.train.beta2) * (g * g - v)
            self.values[name] -= np.float32(plan.lr_embed) * (m / plan.bias1) / (np.sqrt(v / plan.bias2) + 1e-8)
        return Done(StepResult(loss, float(np.sqrt(sum((g * g).sum() for g in grads.values()))), True))

    def _gradient(self, batch: Batch) -> tuple[float, Arrays]:
        tokens, targets = batch.tokens.ravel(), batch.targets.ravel()
        embed = self.values["embed.weight"]
        logits = self.logits(batch.tokens).reshape(len(tokens), -1)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        loss = float(-np.log(p[np.arange(len(targets)), targets]).mean())
        p[np.arange(len(targets)), targets] -= 1
        p /= len(targets)
        grad = p.T @ embed[tokens]
        np.add.at(grad, tokens, p @ embed)
        return loss, {"embed.weight": grad, "head.bias": p.sum(axis=0)}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        embed = self.values["embed.weight"]
        return embed[tokens] @ embed.T + self.values["head.bias"]

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        logits = self.logits(tokens).astype(np.float64)
        total = np.log(np.exp(logits).sum(axis=-1))
        return total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]

    def params(self) -> Arrays:
        return {name: value.copy() for name, value in self.values.items()}

    def weights(self) -> Arrays:
        return self.params()

    def quantised(self) -> dict[str, Stored]:
        return {name: Stored(value.astype(np.float16), None) for name, value in self.values.items()}

    def load_params(self, params: Arrays, quantise: bool = False) -> None:
        self.values = {name: value.copy() for name, value in params.items()}

    def stats(self) -> dict[str, float]:
        return {"traces": 0.0}

    def optimizer(self) -> Arrays:
        return {name: value.copy() for name, value in self.state.items()}

    def load_optimizer(self, state: Arrays) -> None:
        if state.keys() != self.state.keys():
            raise ValueError("optimizer state: other names")
        self.state = {name: value.copy() for name, value in state.items()}


def config_of(**train_fields: Any) -> RunConfig:
    """Return a debug run of 24 short steps with everything due at odd moments."""
    base = presets.get("debug").config
    fields: dict[str, Any] = {
        "steps": 24, "batch": 8, "seq": 32, "lr_embed": 0.1,
        "log_every": 5, "eval_every": 9, "sample_every": None, "save_every": 7,
    }  # fmt: skip
    settings = dataclasses.replace(base.train, **{**fields, **train_fields})
    return dataclasses.replace(base, train=settings, eval=dataclasses.replace(base.eval, batch=32))


def start(path: Path, config: RunConfig, dataset: Dataset, **faults: Any) -> tuple[Run, Any]:
    """Make or open a run and an engine for it."""
    return Run.create(path, config, dataset.tokenizer.model), BigramEngine(config, **faults)


def go(path: Path, config: RunConfig, dataset: Dataset, **faults: Any) -> Run:
    """Train a run to its end."""
    run, engine = start(path, config, dataset, **faults)
    train(run, engine, dataset, lambda line: None)
    return run
