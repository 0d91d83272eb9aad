"""The scored weights, as they learn from scored text: SGD beside the masters. A translation of the PyTorch file."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from backends.mlx import device, optim
from backends.mlx.distributed import reduce
from backends.mlx.masters import Masters
from core.data.batch import Batch
from core.engine.adapting import AdaptStep, check_descent, target_shares
from core.engine.protocol import Arrays, StepResult
from core.model.params import check_arrays


class Descent(Masters):
    """The part of core.engine.protocol.Engine that moves the scored weights themselves."""

    dtype: str
    _loose: dict | None = None
    """Every scored weight, while some of them may move."""
    _momenta: dict
    _costs: Any
    _constants: Any
    _rows: Any
    _compiled_step: Any

    @functools.cached_property
    def _weighed(self):
        return self._compiled_step(self._add_cost)

    @functools.cached_property
    def _moved(self):
        return self._compiled_step(optim.sgd)

    def _scored(self):
        return super()._scored() if self._loose is None else self._loose

    def loosen(self, names: Sequence[str]) -> None:
        check_descent(self._table, names)
        self._loose = dict(self._scored())
        self._momenta = {name: mx.zeros_like(self._loose[name]) for name in names}

    def descend(self, batch: Batch, step: AdaptStep) -> StepResult:
        weights = self._loosened()
        check_descent(self._table, self._momenta, step)
        shares, rows, seq = target_shares(batch.targets, self.ranks), *batch.tokens.shape
        loss, grads = mx.zeros((), self._wide), self._like_momenta()
        for begin in range(0, rows, size := self._rows(seq)):
            part = slice(begin, begin + size)
            loss, grads = self._slopes(loss, grads, batch.tokens[part], batch.targets[part], shares[part])
            mx.eval(loss, grads)  # MLX: one micro-batch's activations at a time
        if self.ranks.world > 1:  # a rank without rows takes part with zeros
            grads, loss = reduce(self.ranks, grads, loss)
        mean, norm = float(np.array(loss)), float(np.array(optim.global_norm(grads.values())))
        finite = math.isfinite(mean) and math.isfinite(norm)
        if finite:
            scale = min(1.0, step.clip / (norm + 1e-6)) if step.clip else 1.0
            moving, momenta = [weights[name] for name in self._momenta], list(self._momenta.values())
            # MLX: a float of Python's would become a float32.
            numbers = [mx.array(np.array(x), self._wide) for x in (step.lr, step.decay, step.momentum, scale)]
            new, changed = self._moved(moving, list(grads.values()), momenta, *numbers)
            mx.eval(new, changed)
            weights.update(zip(self._momenta, new, strict=True))
            self._momenta = dict(zip(self._momenta, changed, strict=True))
        return StepResult(mean, norm, finite)

    def loosened(self) -> Arrays:
        return {name: np.array(value) for name, value in self._movable().items()}

    def load_loosened(self, arrays: Arrays) -> None:
        shapes = {name: tuple(value.shape) for name, value in self._movable().items()}
        check_arrays(arrays, shapes, "loosened weights")
        self._loosened().update({name: mx.array(arrays[name], self._wide) for name in self._momenta})
        self._momenta = {name: mx.array(arrays[f"{name}.m"], self._wide) for name in self._momenta}

    def forget_momenta(self) -> None:
        self._loosened()
        self._momenta = self._like_momenta()

    def tighten(self) -> None:
        self._loose, self._momenta = None, {}

    def _loosened(self):
        """Return every scored weight; ValueError if none may move."""
        if self._loose is None:
            raise ValueError("no weight is loose: call loosen first")
        return self._loose

    def _movable(self):
        """Return what `loosened` does, on the device."""
        weights = self._loosened()
        moving = {name: weights[name] for name in self._momenta}
        return moving | {f"{name}.m": momentum for name, momentum in self._momenta.items()}

    def _like_momenta(self):
        return {name: mx.zeros_like(momentum) for name, momentum in self._momenta.items()}

    def _slopes(self, loss, grads, tokens, targets, shares):
        """Return a cost and gradients at what may move with those of rows: each target's nats times its share."""
        weights = self._loosened()
        moving = {name: weights[name] for name in self._momenta}
        rest = {name: value for name, value in weights.items() if name not in moving}
        given = mx.array(tokens), mx.array(np.maximum(targets, 0)), mx.array(shares, self._wide)
        return self._weighed(moving, rest, loss, grads, *given, self._constants(tokens.shape[1]))

    def _add_cost(self, moving, rest, loss, grads, tokens, targets, shares, tables):
        """Add the sum of the targets' nats times their shares, by the forward pass that scores, and its gradients."""

        def cost(moving):
            nll, _ = self._costs(rest | moving, tokens, targets, tables)
            total = mx.sum(nll * shares)
            return total, total

        (_, new), more = device.value_and_grad(cost, self.dtype)(moving)
        return loss + new, {name: grads[name] + more[name] for name in grads}
