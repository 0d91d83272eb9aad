"""Adapters in PyTorch: passes in which every row has low-rank maps of its own, and what those learn of them."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from backends.cuda import ops, optim
from backends.cuda.linear import Adapter
from backends.cuda.masters import Masters
from backends.cuda.model import Model
from backends.cuda.predicting import PredictedTape
from core.engine.adapting import AdaptStep, learning_rows
from core.engine.protocol import Arrays, State
from core.model.adapters import AdapterSpec, adapter_sizes, first_a, unflat_a


class Adapters(NamedTuple):
    """See core.engine.protocol.Adapters. Letters: B rows, N values of a row: every A, then every B; M of A alone."""

    spec: AdapterSpec
    first_BM: Any
    values_BN: Any
    m_BN: Any
    v_BN: Any
    model: Any  # ModelConfig

    def a(self) -> Arrays:
        return unflat_a(self.model, self.spec, self.values_BN[:, : self.first_BM.shape[1]].cpu().numpy())


class AdaptedTape(PredictedTape):
    """See core.engine.protocol.AdaptedTape."""

    def __init__(self, before, tokens, model, logits, targets, prediction, exact, adapters, values, plain):
        if prediction is None:
            self.before, self.tokens, self.model = before, tokens, model
            self._nats, self._moments = plain.detach(), None
        else:
            super().__init__(before, tokens, model, logits.detach(), targets, prediction, exact)
        self.adapters, self._values, self._plain = adapters, values, plain

    def gradient(self, shares):
        """Return the gradient of the sum of shares (B, T) times nats, (B, N); once, the pass is let go of."""
        if self._plain is None:
            raise ValueError("adapt: these nats have been learned from; run the pass again")
        plain, self._plain = self._plain, None
        return torch.autograd.grad(plain, self._values, torch.from_numpy(shares).to(plain))[0]


class Adapting(Masters):
    """The part of core.engine.protocol.Engine that adapters are in."""

    _model: Model
    _forward: Any
    _constants: Any
    _begins: Any
    _move: Any
    _compute: Any
    _exact: bool
    _compiled_pass: Any

    @functools.cached_property
    def _adapt_costs(self):
        return self._compiled_pass(self._adapted_costs)

    @functools.cached_property
    def _adapt_rule(self):
        return self._compiled_pass(self._adapt_rows)

    def adapters(self, spec: AdapterSpec, rows: int, slot: int, a: Arrays | None = None) -> Adapters:
        first_BM = torch.from_numpy(first_a(self._config, spec, rows, slot, a)).to(self._device, self._wide)
        b_BX = torch.zeros((rows, self._b_size(spec)), dtype=self._wide, device=self._device)
        values_BN = torch.cat([first_BM, b_BX], dim=1)
        nothing_BN = torch.zeros_like(values_BN)
        return Adapters(spec, first_BM, values_BN, nothing_BN, nothing_BN, self._config)

    def adapted(
        self,
        adapters: Adapters,
        tokens: np.ndarray,
        targets: np.ndarray,
        prediction: Any = None,
        state: State | None = None,
        often: bool = False,
    ) -> AdaptedTape:
        costs = self._adapt_costs if often and state is None else self._adapted_costs
        begins = self._begins(tokens) if state is None else None
        tables = self._constants(tokens.shape[1], None if state is None else state.position)
        values, carried = adapters.values_BN.detach().requires_grad_(), None if state is None else state.model
        with torch.enable_grad():
            given = self._move(tokens), self._move(targets), tables, carried, begins, prediction is not None
            plain, logits, model = costs(self._scored(), values, tuple(adapters.spec), *given)
        told = logits, given[1], prediction, self._exact
        return AdaptedTape(state, tokens, model, *told, adapters, values, plain)

    def _adapted_costs(self, weights, values, spec, tokens, targets, tables, state, begins, whole):
        """Return -log p(target) of every position, the logits if `whole`, and what `commit` makes states of."""
        maps = self._maps(AdapterSpec(*spec), values)
        try:
            given = (tokens, tables, True, None, state, whole, None, begins, maps)
            logits, tape = self._forward(weights, *given)
        finally:
            self._model.take_back()
        # Logits that a prediction changes are capped; else the cap is a part of the loss, which keeps less.
        beyond = () if whole else (self._config.head.softcap, weights.get("head.bias"))
        nll, _ = ops.cross_entropy(logits, targets, self._exact, *beyond)
        return nll, logits if whole else None, None if state is None else tape

    def adapt(self, tape: AdaptedTape, shares: np.ndarray, step: AdaptStep) -> Adapters:
        rows_B, old = learning_rows(shares, tape.tokens), tape.adapters
        grad_BN = tape.gradient(np.ascontiguousarray(shares))
        if not rows_B.any():
            return old
        columns = [torch.from_numpy(x[:, None]).to(grad_BN) for x in step.by_row(len(rows_B))]
        given = grad_BN, torch.from_numpy(rows_B[:, None]).to(self._device), columns
        new = self._adapt_rule(old.values_BN, old.m_BN, old.v_BN, *given, tuple(step.constants))
        return old._replace(**dict(zip(("values_BN", "m_BN", "v_BN"), new, strict=True)))

    def _adapt_rows(self, values, m, v, grad, rows, columns, constants):
        """Return values and moments after one update of the marked rows, each clipped by itself."""
        (lr, bias1, bias2), (rule, beta1, beta2, eps, decay, momentum, clip) = columns, constants
        norm_B1 = torch.sqrt(torch.sum(torch.square(grad), dim=1, keepdim=True))
        grad = grad * optim.clip_scale(norm_B1, clip) if clip else grad
        if rule == "adamw":
            new = optim.adamw(values, grad, m, v, lr, decay, bias1, bias2, beta1, beta2, eps)
        else:
            moved = momentum * m + grad
            new = values - lr * (moved + decay * values), moved, v
        return [torch.where(rows, a, b) for a, b in zip(new, (values, m, v), strict=True)]

    def reset(self, adapters: Adapters, rows: np.ndarray, keep_a: bool) -> Adapters:
        marked = torch.from_numpy(rows[:, None]).to(self._device)
        values, size = adapters.values_BN, adapters.first_BM.shape[1]
        a_BM = values[:, :size] if keep_a else torch.where(marked, adapters.first_BM, values[:, :size])
        values_BN = torch.cat([a_BM, values[:, size:].masked_fill(marked, 0.0)], dim=1)
        m_BN, v_BN = (moment.masked_fill(marked, 0.0) for moment in (adapters.m_BN, adapters.v_BN))
        return adapters._replace(values_BN=values_BN, m_BN=m_BN, v_BN=v_BN)

    def _b_size(self, spec):
        """Return how many values of a row are in B."""
        return sum(adapter_sizes(self._config, spec)[len(spec.sites) :])

    def _maps(self, spec, values_BN):
        """Return site -> Adapter, in the compute type."""
        # Cast and split at once: gradients come back as one array by one concatenation.
        parts = torch.split(values_BN.to(self._compute), adapter_sizes(self._config, spec), dim=1)
        rows, rank, half = len(values_BN), spec.rank, len(spec.sites)
        shaped = [part.reshape(rows, rank, -1) for part in parts]
        pairs = zip(spec.sites, shaped[:half], shaped[half:], strict=True)
        return {site: Adapter(a, b, spec.alpha / rank) for site, a, b in pairs}
