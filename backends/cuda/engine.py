"""The PyTorch engine: model, optimizer and device behind core.engine.protocol.Engine; the MLX engine's twin."""

import functools
import importlib
import resource
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from backends.cuda import attention, noise, ops
from backends.cuda.adapting import Adapting
from backends.cuda.banks import Quantiser, compiler_options, noised_all, softened_all
from backends.cuda.descent import Descent
from backends.cuda.distributed import Reducer
from backends.cuda.further import further_loss
from backends.cuda.masters import Masters
from backends.cuda.model import Model
from backends.cuda.predicting import Predicting
from backends.cuda.staging import to_gpu
from backends.cuda.tape import Tape
from backends.cuda.update import Update
from core.data.batch import Batch
from core.engine.fitting import fitting, note, usable
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
from core.model.context import Constants, Training, each_array
from core.model.params import check_arrays
from core.model.tables import mixer_tables, rope_tables

IN_FLIGHT = 2
PASS, AHEAD = 65_536, 32
"""Tokens of a forward pass of scoring on a GPU, and how many passes are under way there."""
SPARE = 8
"""Compilations of one part of the step beyond those that a run declares: evaluation during training has other rows."""
ROOMS = 4
"""How often the room for documents (attention.spans) may grow."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Pending:
    """One step that may still be running; `result` waits for it."""

    def __init__(self, loss, norm, finite, done):
        self.values, self.done = (loss, norm, finite), done

    def result(self) -> StepResult:
        loss, norm, finite = self.values
        return StepResult(loss.item(), norm.item(), bool(finite.item()))


class Engine(Predicting, Adapting, Descent, Masters):
    """See core.engine.protocol.Engine for every public method."""

    backend = "cuda"

    def __init__(self, config, weights: Arrays, options: EngineOptions, quantise: bool, ranks):
        gpu = torch.cuda.is_available()
        self.dtype = options.dtype or ("bfloat16" if gpu else "float32")
        wide = torch.float64 if self.dtype == "float64" else torch.float32
        super().__init__(config, ranks, wide, torch.device("cuda" if gpu else "cpu"))
        self.device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        torch.set_float32_matmul_precision("highest")  # CUDA: NVIDIA's images turn TF32 on by a variable
        self._compute = DTYPES[self.dtype]
        self._exact = self.dtype == "float64" if options.exact is None else options.exact
        narrow = options.newton_schulz or ("bfloat16" if gpu and self.dtype == "bfloat16" else None)
        self._orthogonal = DTYPES[narrow] if narrow else self._wide
        self._wire = DTYPES[options.wire] if options.wire else None
        wanted = options.compile if options.compile is not None else gpu
        self._attention = attention.choose(
            config.model, self.dtype, self._exact, self._device, config.train.seq, traced=wanted
        )
        self._spans = {(rows, seq): count for rows, seq, count in options.spans}
        attend = None if self._attention.form is None else self._attention.form.attend
        with torch.device("meta"):  # CUDA: the module holds no weights: as in MLX, they come as arguments
            self._model = Model(config.model, self._exact, attend)
        names = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        own = {name: value for name, value in weights.items() if name not in self._scaffolding}
        check_arrays(own, names, "weights for the torch model")
        self._tables: dict[int, Constants] = {}
        self._mixing = [
            torch.tensor(table, dtype=self._wide, device=self._device) for table in mixer_tables(config.model)
        ]
        self.scoring = Scoring(PASS, AHEAD) if gpu else Scoring()
        self._staging = to_gpu(self._device) if gpu else None
        self._in_flight: deque[Pending] = deque()
        self._traces = 0
        self._asked = bool(self._train.depth_drop) or self._config.head.untied
        passes = {repeat: trunk.layers(self._config, repeat) for repeat in (False, True)}
        self._labels = {repeat: [stage.label for stage in stages] for repeat, stages in passes.items()}
        self._depth = self._integers(depth_keys(len(self._labels[True]) if self._train.depth_drop else 0))
        self.load_params(weights, quantise)
        wanted = options.compile if options.compile is not None else gpu
        compiled = functools.partial(torch.compile, backend=self._count, dynamic=False) if wanted else lambda f: f
        self._compiled_step = compiled
        self._compiled_pass = functools.partial(torch.compile, dynamic=False) if wanted else lambda f: f
        self._objective, self._score = compiled(self._losses), self._compiled_pass(self._costs)
        self._update = Update(config, self._banks, self._buckets, ranks, self._orthogonal, compiled)
        self._finish = self._update.alone
        self._store = Quantiser(functools.partial(compiled, backend=self._count_exact) if wanted else None)
        self._soften, self._shake = compiled(softened_all), compiled(noised_all)
        self._memory = usable(torch.cuda.mem_get_info()[1] if gpu else None, ranks)
        self._fitting: dict[int, int] = {}
        if wanted:  # past its limit, which is that of all engines together, torch goes on eagerly
            limits = torch._dynamo.config
            limits.recompile_limit += SPARE + self._shapes()
            limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 2 * limits.recompile_limit)
        self.notes = (
            f"compile: loss and each bank's update (torch.compile), {self._shapes()} shapes declared"
            if wanted
            else "compile: off (eager)",
            self._attention.note,
            f"scan: {'exact, step by step' if self._exact else 'Triton kernel' if gpu else 'in chunks'}",
            f"cross-entropy: {'exact, composed' if self._exact else 'Triton kernel' if gpu else 'softcap apart'}",
            *wire_note(options, ranks),
            *note(config, self._rows(self._train.seq), self._memory),
            f"quantisers: {self._store.note}",
            f"float32 products: in full, TF32 off; Newton-Schulz in {str(self._orthogonal).removeprefix('torch.')}",
        )

    # What is compiled on a GPU.

    def _count(self, graph, inputs, **options):
        """Compile as torch.compile's default does, and count it: a counter inside the traced code would be a guard."""
        self._traces += 1
        with warnings.catch_warnings():  # CUDA: TF32 is off because we say so
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
            return torch._dynamo.lookup_backend("inductor")(graph, inputs, **options)

    def _count_exact(self, graph, inputs):
        """Compile so that every operation rounds as it does eagerly, and count it."""
        return self._count(graph, inputs, config_patches=compiler_options())

    def _forward(
        self, weights, tokens, tables, repeat=True, record=None, state=None, capped=True, training=None, begins=None,
        adapters=None, draft=None,
    ):  # fmt: skip
        given = (tokens, tables, self._compute, repeat, record, state, capped, training, begins, adapters, draft)
        return functional_call(self._model, weights, given, strict=True)

    def _read(self, tokens, **options):
        """Run the scored weights over rows of tokens from the host; return what the model returns."""
        options["begins"] = self._begins(tokens)
        return self._forward(self._scored(), self._move(tokens), self._constants(tokens.shape[1]), **options)

    def _costs(self, weights, tokens, targets, tables, repeat=True, training=None, record=None, begins=None):
        """Return -log p(target) and the logsumexp of every position."""
        given = (tokens, tables, repeat, record)
        logits, _ = self._forward(weights, *given, capped=False, training=training, begins=begins)
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

    def _losses(self, weights, tokens, targets, tables, repeat, route=True, begins=None, given=None):
        model = {name: weights[name] for name in self._table}
        auxiliary = self._train.auxiliary
        record: Any = {} if self._train.mtp_heads or auxiliary else None
        training = self._training(tokens, repeat, route, given)
        nll, total = self._costs(model, tokens, targets, tables, repeat, training, record, begins)
        loss = torch.mean(nll)
        objective = loss + self._train.z_loss * torch.mean(torch.square(total)) if self._train.z_loss else loss
        if self._train.mtp_heads:
            heads = [weights[name] for name in self._scaffolding]
            further = further_loss(record["hidden"], heads, targets, self._config, self._exact)
            objective = objective + self._train.mtp_weight * further
        for name, loss_B in record["auxiliary"] if auxiliary else ():
            objective = objective + auxiliary[name] * torch.mean(loss_B)
        return objective, loss

    def _gradient(self, weights, batch, part, repeat, ready=None, route=True, given=None):
        """Return (objective, loss, gradients) of one micro-batch; `ready` gets each gradient when it is there."""
        tokens, targets = self._move(batch.tokens[part]), self._move(batch.targets[part])
        tables, begins = self._constants(tokens.shape[1]), self._begins(batch.tokens[part])
        objective, loss = self._objective(weights, tokens, targets, tables, repeat, route, begins, given)
        hooks = [weights[n].register_hook(functools.partial(ready, n)) for n in self._trains] if ready else []
        found = torch.autograd.grad(objective, [weights[name] for name in self._trains], allow_unused=True)
        for hook in hooks:
            hook.remove()
        grads = dict(zip(self._trains, found, strict=True))
        # What only repeats or experts use has none while they are off.
        for name in (name for name, grad in grads.items() if grad is None):
            grads[name] = torch.zeros_like(weights[name])
            if ready:
                ready(name, grads[name])
        return objective.detach(), loss.detach(), grads

    # The protocol.

    def train_step(self, batch: Batch, plan: StepPlan) -> Pending:
        hyper = self._numbers(plan.numbers)
        seq = batch.tokens.shape[1]
        parts, shares, number = micro_batches(batch, self._rows(seq), self.ranks.world)
        count = self._numbers(number)  # CUDA: a number of the host's would be a constant of the compiled code
        reducer = Reducer(self.ranks, self._buckets, self._wire) if self.ranks.world > 1 else None
        loss, grads = 0.0, {}
        key = step_key(self._run.seed, plan.step)
        weights, slopes = self._learned(plan, key)
        for part, share in zip(parts, shares, strict=True):
            last = part is parts[-1]
            ready = functools.partial(_send, reducer, grads, share) if reducer is not None and last else None
            given = self._given(key, batch.first + part.start, hyper)
            _, new, more = self._gradient(weights, batch, part, plan.repeat, ready, plan.route, given)
            loss = loss + new * share
            if ready is None:
                grads = {name: _sum(grads, share, name, g) for name, g in more.items()}
        del weights
        if reducer is None:
            numbers = self._finish(self._params, self._state, grads, loss, hyper, count, slopes)
        else:
            numbers = self._update.together(self._params, self._state, reducer, loss, hyper, count, slopes)
        if plan.snapshot:
            self._update.collect(self._means, self._snapshots, self._state, numbers[2])
        self.quantise, self._weights = plan.quantise, None
        self._in_flight.append(Pending(*numbers, self._mark()))
        if len(self._in_flight) > IN_FLIGHT:
            done = self._in_flight.popleft().done
            if done is not None:
                done.synchronize()
        return self._in_flight[-1]

    def trace(self, batch: Batch, quantise: bool = False) -> tuple[Callable, tuple]:
        """Return the objective of a batch as a function and its arguments, for PyTorch's tracers; nothing has run."""
        weights, tables = self._trained(self._params, quantise), self._constants(batch.tokens.shape[1])
        rows = self._move(batch.tokens), self._move(batch.targets)
        return self._losses, (weights, *rows, tables, True, True, self._begins(batch.tokens))

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return self.nll_later(tokens, targets, False)()

    @torch.no_grad()
    def nll_later(self, tokens: np.ndarray, targets: np.ndarray, often: bool) -> Callable[[], np.ndarray]:
        costs = self._score if often else self._costs
        given, begins = (self._move(tokens), self._move(targets)), self._begins(tokens)
        nll, _ = costs(self._scored(), *given, self._constants(tokens.shape[1]), begins=begins)
        return lambda: nll.cpu().numpy()

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._read(tokens)[0].cpu().numpy()

    @torch.no_grad()
    def second_moments(self, tokens: np.ndarray, names: Sequence[str] | None = None) -> Arrays:
        matrices = self._model.matrices()
        names = named_matrices(names, [name for name in self._table if name in matrices])
        try:
            for name in names:
                width = self._table[name].shape[1]
                matrices[name]._moment = torch.zeros((width, width), dtype=self._wide, device=self._device)
            self._read(tokens)
            return {name: matrices[name]._moment.cpu().numpy() for name in names}
        finally:
            for name in names:
                matrices[name]._moment = None

    def start(self, rows: int) -> State:
        return State(self._model.start(rows, self._device), np.zeros(rows, np.int64), np.zeros(rows, np.int64))

    @torch.no_grad()
    def chunk(self, state: State, tokens: np.ndarray) -> Tape:
        constants = self._constants(tokens.shape[1], state.position)
        logits, tape = self._forward(self._scored(), self._move(tokens), constants, state=state.model)
        return Tape(state, tokens, logits, tape, self._exact)

    @torch.no_grad()
    def commit(self, tape: Tape, n: int | np.ndarray) -> State:
        before, n = begun(tape.before), counts(tape.tokens, n)
        if not n.any():
            return before
        seen = before.seen_after(tape.tokens, n, self._config)
        model = self._model.commit(tape.model, torch.from_numpy(n).to(self._device), int(seen.max()))
        model = each_array(model, torch.Tensor.detach)  # CUDA: a pass with adapters would be kept by its states
        return State(model, before.position + n, seen)

    def forget(self, state: State, rows: np.ndarray) -> State:
        model = self._model.forget(state.model, torch.from_numpy(rows).to(self._device))
        return State(model, np.where(rows, 0, state.position), np.where(rows, 0, state.seen))

    def twin(self, config: Any, params: Arrays | None = None) -> Any:
        # By its name: no evaluation imports it, so that none has to pack its code.
        return importlib.import_module("backends.cuda.twin").Twin(self, config, params)

    def stats(self) -> dict[str, float]:
        if self._device.type == "cuda":
            memory = {
                "peak_bytes": float(torch.cuda.max_memory_allocated()),
                "active_bytes": float(torch.cuda.memory_allocated()),
                "limit_bytes": float(torch.cuda.mem_get_info()[1]),
            }
        else:  # CUDA: on the CPU only the whole process can be measured (in bytes on macOS, kilobytes elsewhere)
            unit = 1 if sys.platform == "darwin" else 1024
            memory = {"process_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
        return {**memory, "traces": float(self._traces)}

    def _given(self, key, first, hyper):
        """Return what a compiled pass gets of a step beside rows, of which `first` come before; None: no use for it."""
        return (self._integers([key, first]), hyper) if self._asked else None

    def _rows(self, seq):
        """Return how many rows of `seq` tokens go through the model at once."""
        if seq not in self._fitting:
            self._fitting[seq] = fitting(self._run, seq, self.dtype, self._memory, self._exact)
        return self._fitting[seq]

    def _begins(self, tokens):
        """Return where documents begin in rows from the host, or None where attention takes a mask."""
        form = self._attention.form
        if form is None or not form.spans or self._config.documents == "packed":
            return None
        return self._move(attention.spans(tokens, self._config.bos, self._spans.get(tokens.shape)))

    def _shapes(self):
        """Return how many times one part of the step may be compiled: for each shape that a run can have."""
        spans = self._attention.form is not None and self._attention.form.spans
        losses = len(self._train.shapes) * (1 + (self._train.repeat_from > 0 or self._train.repeat_every > 1))
        losses *= 1 + (self._train.route_from > 0)
        # a rank's last micro-batch may have fewer rows, and that of a stage of fewer rows
        losses *= (1 + (self.ranks.world > 1 or bool(self._train.batch_stages))) * (ROOMS if spans else 1)
        return max(losses, len(self._banks))

    def _constants(self, seq, position=None):
        """Return the tables of rows from `position` (B,) on; None: from 0, which are kept."""
        if position is None and seq in self._tables:
            return self._tables[seq]
        dims = self._config.attention.rope_dims if self._config.mixes("attention") else 0
        tables = rope_tables(seq, dims, self._config.attention.rope_base, position)
        cos, sin = (torch.tensor(table, dtype=self._wide, device=self._device) for table in tables)
        made = Constants(cos, sin, *self._mixing)
        if position is not None:
            return made._replace(position=torch.from_numpy(position).to(self._device))
        self._tables[seq] = made
        return made

    def _move(self, array):
        return self._staging(array) if self._staging else torch.from_numpy(np.ascontiguousarray(array, np.int32))

    def _mark(self):
        """Return an event after the work queued so far, or None where the device runs in step with the host."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def _sum(grads, share, name, grad):
    """Return a micro-batch's gradient, weighted, with those of the micro-batches before."""
    grad = grad if share == 1 else grad * share
    return grads[name] + grad if name in grads else grad


def _send(reducer, grads, share, name, grad):
    """Send the gradient of a step to the other ranks: of the last micro-batch, while its backward pass goes on."""
    reducer.add(name, _sum(grads, share, name, grad.detach()))


def build(config, weights: Arrays, options: EngineOptions, quantise: bool, ranks, kind=Engine) -> Any:
    """Return the engine of `config` with `weights`, of class `kind`."""
    return kind(config, weights, options, quantise, ranks)
