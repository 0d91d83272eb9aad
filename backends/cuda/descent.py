"""The scored weights, as they learn from scored text: SGD beside the masters. A translation of the MLX file."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from backends.cuda import optim
from backends.cuda.masters import Masters
from core.data.batch import Batch
from core.engine.adapting import AdaptStep, check_descent, target_shares
from core.engine.protocol import Arrays, StepResult
from core.model.params import check_arrays


class Descent(Masters):
    """The part of core.engine.protocol.Engine that moves the scored weights themselves."""

    _loose: dict | None = None
    """Every scored weight, while some of them may move."""
    _momenta: dict
    _costs: Any
    _constants: Any
    _begins: Any
    _move: Any
    _rows: Any
    _compiled_step: Any

    @functools.cached_property
    def _weighed(self):
        return self._compiled_step(self._cost)

    def _scored(self):
        return super()._scored() if self._loose is None else self._loose

    def loosen(self, names: Sequence[str]) -> None:
        check_descent(self._table, names)
        scored = dict(self._scored())
        self._loose = scored | {name: scored[name].clone() for name in names}  # CUDA: they are updated in place
        self._momenta = {name: torch.zeros_like(scored[name]) for name in names}

    def descend(self, batch: Batch, step: AdaptStep) -> StepResult:
        weights = self._loosened()
        check_descent(self._table, self._momenta, step)
        shares, rows, seq = target_shares(batch.targets, self.ranks), *batch.tokens.shape
        loss, grads = torch.zeros((), dtype=self._wide, device=self._device), self._like_momenta()
        for begin in range(0, rows, size := self._rows(seq)):
            part = slice(begin, begin + size)
            new, more = self._slopes(batch.tokens[part], batch.targets[part], shares[part])
            loss = loss + new
            grads = [grad + other for grad, other in zip(grads, more, strict=True)]
        if self.ranks.world > 1:  # a rank without rows takes part with zeros
            sizes = [grad.numel() for grad in grads]
            *sums, loss = torch.split(self.ranks.sum(torch.cat([g.reshape(-1) for g in [*grads, loss]])), [*sizes, 1])
            grads = [part.view_as(grad) for part, grad in zip(sums, grads, strict=True)]
        mean, norm = loss.item(), optim.global_norm(grads).item()
        finite = math.isfinite(mean) and math.isfinite(norm)
        if finite:
            scale = min(1.0, step.clip / (norm + 1e-6)) if step.clip else 1.0
            moving, momenta = [weights[name] for name in self._momenta], list(self._momenta.values())
            optim.sgd(moving, grads, momenta, float(step.lr), step.decay, step.momentum, scale)
        return StepResult(mean, norm, finite)

    def loosened(self) -> Arrays:
        return {name: value.cpu().numpy().copy() for name, value in self._movable().items()}

    def load_loosened(self, arrays: Arrays) -> None:
        movable = self._movable()
        check_arrays(arrays, {name: tuple(value.shape) for name, value in movable.items()}, "loosened weights")
        for name, value in movable.items():
            value.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))

    def forget_momenta(self) -> None:
        self._loosened()
        self._momenta = dict(zip(self._momenta, self._like_momenta(), strict=True))

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
        return [torch.zeros_like(momentum) for momentum in self._momenta.values()]

    def _slopes(self, tokens, targets, shares):
        """Return the cost of rows, each target's nats times its share, and its gradients at what may move."""
        weights = self._loosened()
        moving = {name: weights[name].detach().requires_grad_() for name in self._momenta}
        given = self._move(tokens), self._move(np.maximum(targets, 0)), self._numbers(shares)
        cost = self._weighed({**weights, **moving}, *given, self._constants(tokens.shape[1]), self._begins(tokens))
        # What a token's path leaves out (experts, for one) has no gradient: zeros.
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        return cost.detach(), torch.autograd.grad(cost, list(moving.values()), **options)

    def _cost(self, weights, tokens, targets, shares, tables, begins):
        """Return the sum of the targets' nats times their shares, by the forward pass that scores."""
        nll, _ = self._costs(weights, tokens, targets, tables, begins=begins)
        return torch.sum(nll * shares)
