"""The MLX engine: model, optimizer and device behind core.engine.protocol.Engine; the PyTorch engine's twin."""

import functools
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from backends.mlx import ops, optim, storage
from backends.mlx.blas import load_fast_blas
from backends.mlx.distributed import reduce
from backends.mlx.model import Model
from core.data.batch import Batch
from core.engine.fitting import fitting, note, usable
from core.engine.optimizer_state import averaged, exported, optimizer_slots
from core.engine.plan import NUMBERS, StepPlan
from core.engine.protocol import (
    Arrays,
    EngineOptions,
    Scoring,
    State,
    StepResult,
    counts,
    micro_batches,
    named_matrices,
    wire_note,
)
from core.engine.ranks import buckets, updated_by
from core.model.context import Constants
from core.model.params import banks, check_arrays, param_table
from core.model.storage import Stored
from core.model.tables import mixer_tables, rope_tables

IN_FLIGHT = 2
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float64": mx.float64}


class Pending:
    """One step that may still be running; `result` waits for it."""

    def __init__(self, loss, norm, finite):
        self.values = loss, norm, finite

    def result(self) -> StepResult:
        loss, norm, finite = self.values
        return StepResult(loss.item(), norm.item(), bool(finite.item()))


class Tape:
    """See core.engine.protocol.Tape."""

    def __init__(self, before, tokens, logits, model, exact):
        self.before, self.tokens, self.model = before, tokens, model
        self._logits, self._exact = logits, exact

    def logits(self) -> np.ndarray:
        return np.array(self._logits)

    def nll(self, targets: np.ndarray) -> np.ndarray:
        return np.array(ops.cross_entropy(self._logits, mx.array(targets), self._exact)[0])


class Engine:
    """See core.engine.measured.Measured and its Engine for every public method."""

    backend = "mlx"

    def __init__(self, config, weights: Arrays, options: EngineOptions, quantise: bool, ranks):
        gpu = mx.default_device() == mx.Device(mx.gpu)
        self.dtype = options.dtype or ("bfloat16" if gpu else "float32")
        if gpu and self.dtype == "float64":
            mx.set_default_device(mx.cpu)  # MLX: a GPU has no float64
            gpu = False
        self.device = "Apple GPU" if gpu and mx.metal.is_available() else "GPU" if gpu else "CPU"
        self._compute, self._wide = DTYPES[self.dtype], mx.float64 if self.dtype == "float64" else mx.float32
        self._run, self._config, self._train = config, config.model, config.train
        self._exact = self.dtype == "float64" if options.exact is None else options.exact
        self._orthogonal = DTYPES[options.newton_schulz] if options.newton_schulz else self._wide
        self._wire = DTYPES[options.wire] if options.wire else None
        self._table = param_table(config.model)
        self._model = Model(config.model, self._exact)
        names = {name: tuple(value.shape) for name, value in dict(tree_flatten(self._model.parameters())).items()}
        check_arrays(weights, names, "weights for the MLX model")
        self._tables: dict[int, Constants] = {}
        self._mixing = [mx.array(table, self._wide) for table in mixer_tables(config.model)]
        self.scoring = Scoring()  # MLX: windows of eval.batch, one pass after the other
        self._in_flight: deque[Pending] = deque()
        self._traces = 0
        self._weights = None
        self._banks = banks(config.model)
        self._slots = optimizer_slots(config.model, config.train)
        self._state = {name: mx.zeros(shape, self._wide) for name, shape in self._slots.items()}
        self.load_params(weights, quantise)
        compiler = gpu or shutil.which("g++") is not None
        wanted = options.compile if options.compile is not None else True
        self._compiled = wanted and compiler
        compiled = mx.compile if self._compiled else lambda f: f
        self._whole = compiled(self._step)
        self._accumulate = compiled(self._add_gradient)
        self._finish = compiled(self._update)
        self._change = compiled(self._rules)
        self._after = compiled(self._follow)
        self.ranks, self._buckets = ranks, buckets(config, ranks.world)
        self._memory = usable(None, ranks)  # MLX: its GPU has the machine's
        self._fitting: dict[int, int] = {}
        self._score = compiled(self._costs)
        self._predict = compiled(self._logits)
        self._store = compiled(self._stored)
        self.notes = (
            f"compile: {'whole step (mx.compile)' if self._compiled else 'off' if compiler else 'off, no g++'}",
            f"attention: {'exact, composed' if self._exact else 'mx.fast.scaled_dot_product_attention'}",
            f"scan: {'exact, step by step' if self._exact else 'in chunks'}",
            f"Newton-Schulz in {str(self._orthogonal).removeprefix('mlx.core.')}",
            f"BLAS: {load_fast_blas() if options.fast_blas else 'as MLX ships it'}",
            *wire_note(options, ranks),
            *note(config, self._rows(self._train.seq), self._memory),
        )

    # The pure functions that are compiled: parameters and state go in and come out.

    def _stored(self, params):
        """Return every weight as the artifact would give it back, row after row: as its reader has it."""
        return {name: mx.contiguous(storage.stored(value, self._table[name].storage)) for name, value in params.items()}

    def _trained(self, params, quantise):
        """Return the weights of a training step's forward pass; gradients at them are those of `params`."""
        return self._store(params) if quantise else params

    def _forward(self, weights, tokens, tables, repeat=True, record=None, state=None, capped=True):
        self._model.update(tree_unflatten(list(weights.items())))
        return self._model(tokens, tables, self._compute, repeat, record, state, capped)

    def _logits(self, weights, tokens, tables):
        return self._forward(weights, tokens, tables)[0]

    def _costs(self, weights, tokens, targets, tables, repeat=True):
        """Return -log p(target) and the logsumexp of every position."""
        logits, _ = self._forward(weights, tokens, tables, repeat, capped=False)
        return ops.cross_entropy(logits, targets, self._exact, self._config.head.softcap, weights.get("head.bias"))

    def _losses(self, weights, tokens, targets, tables, repeat):
        nll, total = self._costs(weights, tokens, targets, tables, repeat)
        loss = mx.mean(nll)
        return loss + self._train.z_loss * mx.mean(mx.square(total)) if self._train.z_loss else loss, loss

    def _gradient(self, weights, tokens, targets, tables, repeat):
        """Return (objective, loss, gradients) of one micro-batch."""
        (objective, loss), grads = mx.value_and_grad(self._losses)(weights, tokens, targets, tables, repeat)
        return objective, loss, grads

    def _add_gradient(self, weights, grads, loss, share, tokens, targets, tables, repeat):
        self._traces += self._compiled  # compiled code runs in Python while it is traced only: this counts compilations
        _, new, more = self._gradient(weights, tokens, targets, tables, repeat)
        return loss + new * share, {name: grads[name] + more[name] * share for name in grads}

    def _update(self, params, state, grads, loss, hyper, count):
        """Return (params, state, mean loss, norm, finite) after one clipped and guarded update."""
        loss, norm, finite = self._measured(loss / count, optim.global_norm(grads.values()) / count)
        params, changed = self._rules(params, state, grads, norm, finite, hyper, count)
        return params, {**changed, **self._follow(params, state, finite, hyper)}, loss, norm, finite

    def _measured(self, loss, norm):
        """Return both, and whether they are finite."""
        return loss, norm, mx.isfinite(loss) & mx.isfinite(norm)

    def _rules(self, params, state, grads, norm, finite, hyper, count):
        """Return params and state of the parameters that have gradients, which are `count` times too large."""
        scale = optim.clip_scale(norm, self._train.clip) / count
        numbers, muon = dict(zip(NUMBERS, hyper, strict=True)), self._train.matrix_rule == "muon"
        grads, new_params, new_state = {name: g * scale for name, g in grads.items()}, {}, {}
        for bank in self._banks:
            rule = functools.partial(optim.rule, self._train, bank.group)
            names = [name for name in bank.names if name in grads]
            if bank.group == "matrix" and muon and names:
                param, grad = (mx.stack([of[name] for name in names]) for of in (params, grads))
                slots = {"m": mx.stack([state[f"{name}.m"] for name in names])}
                param, slots = rule(param, grad, slots, numbers, self._orthogonal)
                for i, name in enumerate(names):
                    new_params[name], new_state[f"{name}.m"] = param[i], slots["m"][i]
                continue
            for name in names:
                slots = {slot: state[f"{name}.{slot}"] for slot in ("m", "v")}
                new_params[name], slots = rule(params[name], grads[name], slots, numbers)
                new_state |= {f"{name}.{slot}": value for slot, value in slots.items()}
        return self._guarded(new_params, params, finite), self._guarded(new_state, state, finite)

    def _follow(self, params, state, finite, hyper):
        """Return the running averages, `<param>.ema`, after the update that gave `params`."""
        decay, names = dict(zip(NUMBERS, hyper, strict=True))["average"], averaged(self._config, self._train)
        new = {f"{n}.ema": optim.average(state[f"{n}.ema"], params[n], decay) for n in names}
        return self._guarded(new, state, finite)

    def _guarded(self, new, old, finite):
        # MLX: BLAS multiplies, and rounds, what lies in other strides by another path
        return {name: mx.contiguous(mx.where(finite, value, old[name])) for name, value in new.items()}

    def _update_together(self, grads, loss, hyper, count):
        """Do what _update does with all ranks: each updates its part of Muon's matrices, which then go to all."""
        params, state = self._params, self._state
        grads, loss = reduce(self.ranks, grads, loss, self._wire)
        loss, norm, finite = self._measured(loss / count, optim.global_norm(grads.values()) / count)
        for names in updated_by(self._buckets, self.ranks.rank):
            if names:
                new = self._change(params, state, {n: grads[n] for n in names}, norm, finite, hyper, count)
                params, state = params | new[0], state | new[1]
        params = params | self.ranks.share_updates([b for b in self._buckets if b.slots], params)
        state = state | self._after(params, state, finite, hyper)
        return params, state, loss, norm, finite

    def _step(self, params, weights, state, tokens, targets, tables, hyper, repeat):
        self._traces += self._compiled
        _, loss, grads = self._gradient(weights, tokens, targets, tables, repeat)
        return self._update(params, state, grads, loss, hyper, 1.0)

    # The protocol.

    def train_step(self, batch: Batch, plan: StepPlan) -> Pending:
        hyper = mx.array(np.array(plan.numbers), self._wide)
        seq = batch.tokens.shape[1]
        parts, shares, count = micro_batches(batch, self._rows(seq), self.ranks.world)
        tables, number = self._constants(seq), mx.array(count, self._wide)
        weights = self._trained(self._params, plan.quantise)
        if count == 1 and self.ranks.world == 1:
            tokens, targets = mx.array(batch.tokens), mx.array(batch.targets)
            out = self._whole(self._params, weights, self._state, tokens, targets, tables, hyper, plan.repeat)
        else:
            loss = mx.zeros((), self._wide)
            grads = {name: mx.zeros_like(value) for name, value in self._params.items()}
            for part, share in zip(parts, shares, strict=True):
                tokens, targets = mx.array(batch.tokens[part]), mx.array(batch.targets[part])
                share = mx.array(share, self._wide)
                loss, grads = self._accumulate(weights, grads, loss, share, tokens, targets, tables, plan.repeat)
                mx.eval(loss, grads)  # MLX: one micro-batch's activations at a time
            if self.ranks.world == 1:
                out = self._finish(self._params, self._state, grads, loss, hyper, number)
            else:
                out = self._update_together(grads, loss, hyper, number)
        del weights
        params, state, *numbers = out
        self._params = {name: params[name] for name in self._table}  # MLX: another order would be compiled again
        self._state = {name: state[name] for name in self._slots}
        self.quantise, self._weights = plan.quantise, None
        mx.async_eval(self._params, self._state, *numbers)
        self._in_flight.append(Pending(*numbers))
        if len(self._in_flight) > IN_FLIGHT:
            mx.eval(self._in_flight.popleft().values)
        return self._in_flight[-1]

    def gradients(self, batch: Batch) -> tuple[float, Arrays]:
        weights = self._trained(self._params, self.quantise)
        objective, _, grads = self._gradient(
            weights, mx.array(batch.tokens), mx.array(batch.targets), self._constants(batch.tokens.shape[1]), True
        )
        return float(np.array(objective)), {name: np.array(grads[name]) for name in self._table}

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

    def activations(self, tokens: np.ndarray) -> Arrays:
        record = {}
        self._forward(self._scored(), mx.array(tokens), self._constants(tokens.shape[1]), record=record)
        return {name: np.array(value.astype(self._wide)) for name, value in record.items()}

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
        before, n = tape.before, counts(tape.tokens, n)
        if not n.any():
            return before
        seen = before.seen_after(tape.tokens, n, self._config)
        model = self._model.commit(tape.model, mx.array(n), int(seen.max()))
        mx.eval([part for _, part in tree_flatten(model) if isinstance(part, mx.array)])  # MLX: else graphs would grow
        return State(model, before.position + n, seen)

    def forget(self, state: State, rows: np.ndarray) -> State:
        model = self._model.forget(state.model, mx.array(rows))
        return State(model, np.where(rows, 0, state.position), np.where(rows, 0, state.seen))

    def weights(self) -> Arrays:
        weights = self._scored()
        return {name: np.array(weights[name]) for name in self._table}

    def quantised(self) -> dict[str, Stored]:
        weights = exported(self._config, self._train, self._params, self._state)
        return {name: storage.to_host(weights[name], row.storage) for name, row in self._table.items()}

    def params(self) -> Arrays:
        return {name: np.array(self._params[name]) for name in self._table}

    def load_params(self, params: Arrays, quantise: bool = False) -> None:
        check_arrays(params, {name: row.shape for name, row in self._table.items()}, "weights")
        self._params = self._on_device(params, self._table)
        self._state |= {f"{name}.ema": value for name, value in self._params.items() if f"{name}.ema" in self._slots}
        self.quantise, self._weights = quantise, None
        mx.eval(self._params)

    def optimizer(self) -> Arrays:
        if self.ranks.world > 1:  # each rank has the momentum of the matrices that it updates
            matrices = [b for b in self._buckets if b.slots]
            shared = {name: self._state[f"{name}.m"] for b in matrices for name in b.names}
            shared = self.ranks.share_updates(matrices, shared)
            self._state |= {f"{name}.m": value for name, value in shared.items()}
        return {name: np.array(self._state[name]) for name in self._slots}

    def load_optimizer(self, state: Arrays) -> None:
        check_arrays(state, self._slots, "optimizer state")
        self._state = self._on_device(state, self._slots)
        self._weights = None
        mx.eval(self._state)

    def matmul_rate(self) -> tuple[int, float]:
        n, repeats = (4096 if mx.default_device() == mx.Device(mx.gpu) else 1024), 5
        a = mx.random.normal((n, n)).astype(self._compute)
        mx.eval(a @ a)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            mx.eval(a @ a)
            times.append(time.perf_counter() - start)
        return n, 2 * n**3 / min(times)

    def update_seconds(self, plan: StepPlan, repeats: int) -> float:
        hyper = mx.array(np.array(plan.numbers), self._wide)
        key, loss = mx.random.key(0), mx.ones((), self._wide)
        grads = {name: mx.random.normal(p.shape, key=key).astype(self._wide) for name, p in self._params.items()}
        mx.eval(self._params, self._state, grads, loss, hyper)
        count, start = mx.array(float(self._train.batch // self._train.rows), self._wide), 0.0
        for turn in range(repeats + 1):
            if turn == 1:  # the first one compiles
                start = time.perf_counter()
            if self.ranks.world == 1:
                mx.eval(self._finish(self._params, self._state, grads, loss, hyper, count))
            else:
                mx.eval(self._update_together(grads, loss, hyper, count))
        return (time.perf_counter() - start) / repeats

    def stats(self) -> dict[str, float]:
        memory = {"peak_bytes": float(mx.get_peak_memory()), "active_bytes": float(mx.get_active_memory())}
        return {**memory, "traces": float(self._traces)}

    def _scored(self):
        """Return the weights that are scored, made anew after every change of the masters."""
        if self._weights is None:
            weights = exported(self._config, self._train, self._params, self._state)
            self._weights = self._store(weights) if self.quantise else weights
        return self._weights

    def _on_device(self, arrays, names):
        """Return arrays from the host by name, row after row."""
        # MLX: an array keeps the strides of the numpy array that it is made of
        return {name: mx.array(np.ascontiguousarray(arrays[name]), self._wide) for name in names}

    def _rows(self, seq):
        """Return how many rows of `seq` tokens go through the model at once."""
        if seq not in self._fitting:
            composed = self._exact or mx.default_device() != mx.Device(mx.gpu)  # MLX: fused attention needs a GPU
            self._fitting[seq] = fitting(self._run, seq, self.dtype, self._memory, composed)
        return self._fitting[seq]

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


def build(config, weights: Arrays, options: EngineOptions, quantise: bool, ranks) -> Engine:
    """Return the engine of `config` with `weights`."""
    return Engine(config, weights, options, quantise, ranks)
