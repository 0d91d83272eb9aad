"""The MLX engine: model, optimizer and device behind core.engine.protocol.Engine; the PyTorch engine's twin."""

import functools
import importlib
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from backends.mlx import attention, device, noise, ops
from backends.mlx.adapting import Adapting
from backends.mlx.banks import parts
from backends.mlx.blas import load_fast_blas
from backends.mlx.descent import Descent
from backends.mlx.further import further_loss
from backends.mlx.kernels import trial
from backends.mlx.masters import Masters
from backends.mlx.model import Model
from backends.mlx.predicting import Predicting
from backends.mlx.tape import Tape
from backends.mlx.update import Update
from core.data.batch import Batch
from core.engine.fitting import fitting, note
from core.engine.noise import depth_keys, step_key
from core.engine.plan import NUMBERS, StepPlan
from core.engine.protocol import (
    Arrays,
    EngineOptions,
    Scoring,
    State,
    StepResult,
    begun,
    counts,
    micro_batches,
    named_matrices,
    wire_note,
)
from core.model import trunk
from core.model.context import Constants, Training
from core.model.params import check_arrays
from core.model.tables import mixer_tables, rope_tables

IN_FLIGHT = 2
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16, "float64": mx.float64}


class Pending:
    """One step that may still be running; `result` waits for it."""

    def __init__(self, loss, norm, finite):
        self.values = loss, norm, finite

    def result(self) -> StepResult:
        loss, norm, finite = self.values
        return StepResult(loss.item(), norm.item(), bool(finite.item()))


class Engine(Predicting, Adapting, Descent, Masters):
    """See core.engine.protocol.Engine for every public method."""

    backend = "mlx"

    def __init__(self, config, weights: Arrays, options: EngineOptions, quantise: bool, ranks):
        self._chip, self._resident = device.chip(), False
        gpu, self.device = self._chip.gpu, self._chip.words
        self.dtype = options.dtype or self._chip.dtype
        super().__init__(config, ranks, mx.float64 if self.dtype == "float64" else mx.float32)
        self._compute = DTYPES[self.dtype]
        self._exact = self.dtype == "float64" if options.exact is None else options.exact
        self._orthogonal = DTYPES[options.newton_schulz] if options.newton_schulz else self._wide
        self._wire = DTYPES[options.wire] if options.wire else None
        self._attention = attention.choose(self._exact, gpu)
        self._model = Model(config.model, self._exact, self._attention)
        names = {name: tuple(value.shape) for name, value in dict(tree_flatten(self._model.parameters())).items()}
        own = {name: value for name, value in weights.items() if name not in self._scaffolding}
        check_arrays(own, names, "weights for the MLX model")
        self._tables: dict[int, Constants] = {}
        self._mixing = [mx.array(table, self._wide) for table in mixer_tables(config.model)]
        self.scoring = Scoring()  # MLX: windows of eval.batch, one pass after the other
        self._in_flight: deque[Pending] = deque()
        self._traces = 0
        self._asked = bool(self._train.depth_drop) or self._config.head.untied
        passes = {repeat: trunk.layers(self._config, repeat) for repeat in (False, True)}
        self._labels = {repeat: [stage.label for stage in stages] for repeat, stages in passes.items()}
        self._depth = mx.array(depth_keys(len(self._labels[True]) if self._train.depth_drop else 0))
        self._once = not (config.model.shared_blocks or config.model.repeat_layers)
        self.load_params(weights, quantise)
        compiler = gpu or shutil.which("g++") is not None
        wanted = options.compile if options.compile is not None else True
        self._compiled = wanted and compiler
        compiled = mx.compile if self._compiled else lambda f: f
        self._whole = compiled(self._step)
        self._accumulate = compiled(self._add_gradient)
        self._compiled_step = compiled
        self._update = Update(config, self._banks, self._buckets, ranks, self._orthogonal, self._wire, compiled)
        self._finish = compiled(self._update.alone)
        self._tokens, self._memory = device.micro_batch(self._chip, options.micro_tokens, ranks)
        self._fitting: dict[int, int] = {}
        self._checked: set[int] = set()
        self._score = compiled(self._costs)
        self._predict = compiled(self._logits)
        self._store, self._soften = compiled(self._stored), compiled(self._soft)
        self._shake = compiled(self._shaken)
        self.notes = (
            f"compile: {'whole step (mx.compile)' if self._compiled else 'off' if compiler else 'off, no g++'}",
            self._attention.note,
            *trial.notes(config.model, self._compute, self._exact),
            f"Newton-Schulz in {str(self._orthogonal).removeprefix('mlx.core.')}",
            f"BLAS: {load_fast_blas() if options.fast_blas else 'as MLX ships it'}",
            f"float32 products: {device.products(gpu)}",
            *wire_note(options, ranks),
            *note(config, self._rows(self._train.seq), self._memory, self._tokens),
        )

    # The pure functions that are compiled: parameters and state go in and come out.

    def _named(self, rows):
        """Return the weights by name that a training step's rows of them hold, matrices in the compute type."""
        if self._once:  # MLX: one cast for all; of a matrix that is used twice the gradients are added up wide
            rows = {
                b.key: rows[b.key].astype(self._compute) if b.group == "matrix" else rows[b.key] for b in self._banks
            }
        return parts(self._banks, rows)

    def _forward(
        self, weights, tokens, tables, repeat=True, record=None, state=None, capped=True, training=None, adapters=None,
        draft=None,
    ):  # fmt: skip
        self._model.update(tree_unflatten(list(weights.items())))
        return self._model(tokens, tables, self._compute, repeat, record, state, capped, training, adapters, draft)

    def _logits(self, weights, tokens, tables):
        return self._forward(weights, tokens, tables)[0]

    def _costs(self, weights, tokens, targets, tables, repeat=True, training=None, record=None):
        """Return -log p(target) and the logsumexp of every position."""
        logits, _ = self._forward(weights, tokens, tables, repeat, record, capped=False, training=training)
        return ops.cross_entropy(logits, targets, self._exact, self._config.head.softcap, weights.get("head.bias"))

    def _training(self, tokens, repeat, route, given):
        """Return what parts know of a training step's pass; `given`: what `_given` returned for these rows."""
        training = Training(frozenset(self._train.auxiliary), route)
        if given is None:
            return training
        (key, first), hyper = given
        numbers = dict(zip(NUMBERS, hyper, strict=True))
        if self._train.depth_drop:
            labels = self._labels[repeat]
            factors = noise.kept(key, first, len(tokens), numbers["drop"], self._depth[: len(labels)])
            training = training._replace(kept=dict(zip(labels, factors, strict=True)))
        return training._replace(untied=numbers["untie"])

    def _losses(self, rows, tokens, targets, tables, repeat, route=True, given=None):
        weights = self._named(rows)
        model = {name: weights[name] for name in self._table}
        auxiliary = self._train.auxiliary
        record: Any = {} if self._train.mtp_heads or auxiliary else None
        training = self._training(tokens, repeat, route, given)
        nll, total = self._costs(model, tokens, targets, tables, repeat, training, record)
        loss = mx.mean(nll)
        objective = loss + self._train.z_loss * mx.mean(mx.square(total)) if self._train.z_loss else loss
        if self._train.mtp_heads:
            heads = [weights[name] for name in self._scaffolding]
            further = further_loss(record["hidden"], heads, targets, self._config, self._exact)
            objective = objective + self._train.mtp_weight * further
        for name, loss_B in record["auxiliary"] if auxiliary else ():
            objective = objective + auxiliary[name] * mx.mean(loss_B)
        return objective, loss

    def _gradient(self, weights, tokens, targets, tables, *switches):
        """Return (objective, loss, gradients) of one micro-batch."""
        gradient = device.value_and_grad(self._losses, self.dtype)
        (objective, loss), grads = gradient(weights, tokens, targets, tables, *switches)
        return objective, loss, grads

    def _add_gradient(self, weights, grads, loss, share, tokens, targets, tables, *switches):
        self._traces += self._compiled  # compiled code runs in Python while it is traced only: this counts compilations
        _, new, more = self._gradient(weights, tokens, targets, tables, *switches)
        return loss + new * share, {name: grads[name] + more[name] * share for name in grads}

    def _step(self, params, weights, state, tokens, targets, tables, hyper, *switches):
        self._traces += self._compiled
        _, loss, grads = self._gradient(weights, tokens, targets, tables, *switches)
        return self._update.alone(params, state, grads, loss, hyper, 1.0)

    # The protocol.

    def train_step(self, batch: Batch, plan: StepPlan) -> Pending:
        hyper = mx.array(np.array(plan.numbers), self._wide)
        seq = batch.tokens.shape[1]
        if self._weights is not None:
            mx.clear_cache()  # MLX: memory of scoring's shapes serves no step
        rows = self._rows(seq)
        if seq not in self._checked:
            device.check_memory(self._chip, self._run, rows, seq, self.dtype, self._composed(seq))
            self._checked.add(seq)
        parts, shares, count = micro_batches(batch, rows, self.ranks.world)
        tables, number = self._constants(seq), mx.array(count, self._wide)
        key = step_key(self._run.seed, plan.step)
        weights, slopes = self._learned(plan, key)
        switches = plan.repeat, plan.route
        if count == 1 and self.ranks.world == 1 and self._train.quantise_soft is None:
            tokens, targets = mx.array(batch.tokens), mx.array(batch.targets)
            switches = *switches, self._given(key, batch.first, hyper)
            out = self._whole(self._params, weights, self._state, tokens, targets, tables, hyper, *switches)
        else:
            loss = mx.zeros((), self._wide)
            grads = {name: mx.zeros_like(value) for name, value in self._params.items()}
            for part, share in zip(parts, shares, strict=True):
                tokens, targets = mx.array(batch.tokens[part]), mx.array(batch.targets[part])
                more = tables, *switches, self._given(key, batch.first + part.start, hyper)
                loss, grads = self._accumulate(
                    weights, grads, loss, mx.array(share, self._wide), tokens, targets, *more
                )
                mx.eval(loss, grads)  # MLX: one micro-batch's activations at a time
            grads = {name: grad * slopes[name] if name in slopes else grad for name, grad in grads.items()}
            if self.ranks.world == 1:
                out = self._finish(self._params, self._state, grads, loss, hyper, number)
            else:
                out = self._update.together(self._params, self._state, grads, loss, hyper, number)
        del weights
        params, state, *numbers = out
        self._params = {name: params[name] for name in self._params}  # MLX: another order would be compiled again
        self._state = {name: state[name] for name in self._state}
        self.quantise, self._weights = plan.quantise, None
        if plan.snapshot:
            self._means, self._snapshots = self._update.collect(self._means, self._snapshots, self._state, numbers[2])
        mx.async_eval(self._params, self._state, self._means, self._snapshots, *numbers)
        self._resident = self._resident or device.keep_resident(self, self._chip)
        self._in_flight.append(Pending(*numbers))
        if len(self._in_flight) > IN_FLIGHT:
            mx.eval(self._in_flight.popleft().values)
        return self._in_flight[-1]

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return self.nll_later(tokens, targets, True)()

    def nll_later(self, tokens: np.ndarray, targets: np.ndarray, often: bool) -> Callable[[], np.ndarray]:
        # MLX: compiling takes moments: it is always done
        tables = self._constants(tokens.shape[1])
        nll, _ = self._score(self._scored(), mx.array(tokens), mx.array(targets), tables)
        mx.async_eval(nll)
        return lambda: np.array(nll)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.array(self._predict(self._scored(), mx.array(tokens), self._constants(tokens.shape[1])))

    def second_moments(self, tokens: np.ndarray, names: Sequence[str] | None = None) -> Arrays:
        matrices = self._model.matrices()
        names = named_matrices(names, [name for name in self._table if name in matrices])
        try:
            for name in names:
                width = self._table[name].shape[1]
                matrices[name]._moment = mx.zeros((width, width), self._wide)
            self._forward(self._scored(), mx.array(tokens), self._constants(tokens.shape[1]))
            return {name: np.array(matrices[name]._moment) for name in names}
        finally:
            for name in names:
                matrices[name]._moment = None

    def start(self, rows: int) -> State:
        return State(self._model.start(rows), np.zeros(rows, np.int64), np.zeros(rows, np.int64))

    def chunk(self, state: State, tokens: np.ndarray) -> Tape:
        constants = self._constants(tokens.shape[1], state.position)
        logits, tape = self._forward(self._scored(), mx.array(tokens), constants, state=state.model)
        return Tape(state, tokens, logits, tape, self._exact)

    def commit(self, tape: Tape, n: int | np.ndarray) -> State:
        before, n = begun(tape.before), counts(tape.tokens, n)
        if not n.any():
            return before
        seen = before.seen_after(tape.tokens, n, self._config)
        model = self._model.commit(tape.model, mx.array(n), int(seen.max()))
        mx.eval([part for _, part in tree_flatten(model) if isinstance(part, mx.array)])  # MLX: else graphs would grow
        return State(model, before.position + n, seen)

    def forget(self, state: State, rows: np.ndarray) -> State:
        model = self._model.forget(state.model, mx.array(rows))
        return State(model, np.where(rows, 0, state.position), np.where(rows, 0, state.seen))

    def twin(self, config: Any, params: Arrays | None = None) -> Any:
        # By its name: no evaluation imports it, so that none has to pack its code.
        return importlib.import_module("backends.mlx.twin").Twin(self, config, params)

    def stats(self) -> dict[str, float]:
        memory = {"peak_bytes": float(mx.get_peak_memory()), "active_bytes": float(mx.get_active_memory())}
        return {**memory, "traces": float(self._traces)}

    def _given(self, key, first, hyper):
        """Return what a compiled pass gets of a step beside rows, of which `first` come before; None: no use for it."""
        return (mx.array(np.array([key, first], np.uint32)), hyper) if self._asked else None

    def _rows(self, seq):
        """Return how many rows of `seq` tokens go through the model at once."""
        if seq not in self._fitting:
            composed = self._composed(seq)
            self._fitting[seq] = fitting(self._run, seq, self.dtype, self._memory, composed, self._tokens)
        return self._fitting[seq]

    def _composed(self, seq):
        """Return whether attention keeps its scores for the backward pass."""
        return self._exact or seq < attention.RECOMPUTED

    def _constants(self, seq, position=None):
        """Return the tables of rows from `position` (B,) on; None: from 0, which are kept."""
        if position is None and seq in self._tables:
            return self._tables[seq]
        dims = self._config.attention.rope_dims if self._config.mixes("attention") else 0
        tables = rope_tables(seq, dims, self._config.attention.rope_base, position)
        cos, sin = (mx.array(table, self._wide) for table in tables)
        made = Constants(cos, sin, *self._mixing)
        if position is not None:
            return made._replace(position=mx.array(position))
        self._tables[seq] = made
        return made


def build(config, weights: Arrays, options: EngineOptions, quantise: bool, ranks, kind=Engine) -> Any:
    """Return the engine of `config` with `weights`, of class `kind`."""
    make = functools.partial(kind, config, weights, options, quantise, ranks)
    return device.OnTheCPU(make) if options.dtype == "float64" and device.chip().gpu else make()
