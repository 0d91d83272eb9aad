"""Adapters in MLX: passes in which every row has low-rank maps of its own, and what those learn of them."""

import functools
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from backends.mlx import device, ops, optim
from backends.mlx.linear import Adapter
from backends.mlx.masters import Masters
from backends.mlx.model import Model
from backends.mlx.predicting import PredictedTape
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
        return unflat_a(self.model, self.spec, np.array(self.values_BN[:, : self.first_BM.shape[1]]))


class AdaptedTape(PredictedTape):
    """See core.engine.protocol.AdaptedTape."""

    def __init__(self, before, tokens, model, logits, targets, prediction, exact, adapters, shares, plain, gradient):
        if prediction is None:
            self.before, self.tokens, self.model = before, tokens, model
            self._nats, self._moments = plain, None
            mx.async_eval(plain)
        else:
            super().__init__(before, tokens, model, logits, targets, prediction, exact)
        self.adapters, self._shares, self._gradient = adapters, shares, gradient

    def gradient(self, shares):
        """Return the gradient of the sum of shares (B, T) times nats, (B, N); once, the pass is let go of."""
        if self._gradient is None:
            raise ValueError("adapt: these nats have been learned from; run the pass again")
        gradient, self._gradient = self._gradient, None
        # MLX: a graph's inputs cannot be exchanged, but their memory can be written: what the backward pass begins with
        # was a place of its own, which nothing has read so far.
        np.array(self._shares, copy=False)[...] = shares
        return gradient


class Adapting(Masters):
    """The part of core.engine.protocol.Engine that adapters are in."""

    dtype: str
    _model: Model
    _forward: Any
    _constants: Any
    _compute: Any
    _exact: bool
    _compiled_step: Any

    @functools.cached_property
    def _adapt_costs(self):
        return self._compiled_step(self._adapted_costs)

    @functools.cached_property
    def _adapt_rule(self):
        return self._compiled_step(self._adapt_rows)

    def adapters(self, spec: AdapterSpec, rows: int, slot: int, a: Arrays | None = None) -> Adapters:
        first_BM = mx.array(first_a(self._config, spec, rows, slot, a), self._wide)
        values_BN = mx.concatenate([first_BM, mx.zeros((rows, self._b_size(spec)), self._wide)], axis=1)
        nothing_BN = mx.zeros_like(values_BN)
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
        # MLX: compiling takes moments: it is always done, but for states, whose shapes change.
        costs = self._adapt_costs if state is None else self._adapted_costs
        tables = self._constants(tokens.shape[1], None if state is None else state.position)
        carried, shares = None if state is None else state.model, mx.array(np.zeros(tokens.shape), self._wide)
        rows = mx.array(tokens), mx.array(targets)
        given = *rows, tables, carried, prediction is not None
        out = costs(self._scored(), adapters.values_BN, tuple(adapters.spec), shares, *given)
        plain, logits, model, gradient = out
        told = logits, rows[1], prediction, self._exact
        return AdaptedTape(state, tokens, model, *told, adapters, shares, plain, gradient)

    def _adapted_costs(self, weights, values, spec, shares, tokens, targets, tables, state, whole):
        """Return -log p(target) of every position, the logits if `whole`, what `commit` makes states of, and the
        gradient of the sum of `shares` times the first: evaluated later, it goes on from the same forward pass.
        """
        beside = []

        def costs(values):
            maps = self._maps(AdapterSpec(*spec), values)
            try:
                given = (tokens, tables, True, None, state, whole, None, maps)
                logits, tape = self._forward(weights, *given)
            finally:
                self._model.take_back()
            # Logits that a prediction changes are capped; else the cap is a part of the loss, which keeps less.
            beyond = () if whole else (self._config.head.softcap, weights.get("head.bias"))
            nll, _ = ops.cross_entropy(logits, targets, self._exact, *beyond)
            beside.extend((logits if whole else None, None if state is None else tape))
            return nll

        scale = device.LOSS_SCALE.get(self.dtype, 1.0)
        (nll,), (gradient,) = mx.vjp(costs, [values], [shares * scale if scale != 1.0 else shares])
        return nll, *beside, gradient / scale if scale != 1.0 else gradient

    def adapt(self, tape: AdaptedTape, shares: np.ndarray, step: AdaptStep) -> Adapters:
        rows_B, old = learning_rows(shares, tape.tokens), tape.adapters
        grad_BN = tape.gradient(shares)
        if not rows_B.any():
            return old
        columns = [mx.array(x[:, None], self._wide) for x in step.by_row(len(rows_B))]
        given = grad_BN, mx.array(rows_B[:, None]), columns
        new = self._adapt_rule(old.values_BN, old.m_BN, old.v_BN, *given, tuple(step.constants))
        mx.async_eval(new)
        return old._replace(**dict(zip(("values_BN", "m_BN", "v_BN"), new, strict=True)))

    def _adapt_rows(self, values, m, v, grad, rows, columns, constants):
        """Return values and moments after one update of the marked rows, each clipped by itself."""
        (lr, bias1, bias2), (rule, beta1, beta2, eps, decay, momentum, clip) = columns, constants
        norm_B1 = mx.sqrt(mx.sum(mx.square(grad), axis=1, keepdims=True))
        grad = grad * optim.clip_scale(norm_B1, clip) if clip else grad
        if rule == "adamw":
            new = optim.adamw(values, grad, m, v, lr, decay, bias1, bias2, beta1, beta2, eps)
        else:
            moved = momentum * m + grad
            new = values - lr * (moved + decay * values), moved, v
        return [mx.where(rows, a, b) for a, b in zip(new, (values, m, v), strict=True)]

    def reset(self, adapters: Adapters, rows: np.ndarray, keep_a: bool) -> Adapters:
        marked = mx.array(rows[:, None])
        values, size = adapters.values_BN, adapters.first_BM.shape[1]
        a_BM = values[:, :size] if keep_a else mx.where(marked, adapters.first_BM, values[:, :size])
        values_BN = mx.concatenate([a_BM, mx.where(marked, 0.0, values[:, size:])], axis=1)
        m_BN, v_BN = (mx.where(marked, 0.0, moment) for moment in (adapters.m_BN, adapters.v_BN))
        return adapters._replace(values_BN=values_BN, m_BN=m_BN, v_BN=v_BN)

    def _b_size(self, spec):
        """Return how many values of a row are in B."""
        return sum(adapter_sizes(self._config, spec)[len(spec.sites) :])

    def _maps(self, spec, values_BN):
        """Return site -> Adapter, in the compute type."""
        # Cast and split at once: gradients come back as one array by one concatenation.
        ends = np.cumsum(adapter_sizes(self._config, spec))[:-1].tolist()
        parts = mx.split(values_BN.astype(self._compute), ends, axis=1)
        rows, rank, half = len(values_BN), spec.rank, len(spec.sites)
        shaped = [part.reshape(rows, rank, -1) for part in parts]
        pairs = zip(spec.sites, shaped[:half], shaped[half:], strict=True)
        return {site: Adapter(a, b, spec.alpha / rank) for site, a, b in pairs}
