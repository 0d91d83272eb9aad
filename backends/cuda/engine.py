"""The PyTorch engine: model, optimizer and device behind core.engine.Engine. A translation of the MLX engine."""

import resource
import sys
import time
from collections import deque

import numpy as np
import torch

from backends.cuda import ops, optim
from backends.cuda.model import Model
from core.engine import Arrays, Batch, EngineOptions, StepResult
from core.params import check_arrays, optimizer_slots, param_table
from core.schedule import NUMBERS, StepPlan
from core.tables import rope_tables

IN_FLIGHT = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Pending:
    """One step that may still be running; `result` waits for it."""

    def __init__(self, loss, norm, finite, done):
        self.values, self.done = (loss, norm, finite), done

    def result(self) -> StepResult:
        loss, norm, finite = self.values
        return StepResult(loss.item(), norm.item(), bool(finite.item()))


class Engine:
    """See core.engine.Engine for every public method."""

    backend = "cuda"

    def __init__(self, config, weights: Arrays, options: EngineOptions):
        gpu = torch.cuda.is_available()
        self.dtype = options.dtype or ("bfloat16" if gpu else "float32")
        self._device = torch.device("cuda" if gpu else "cpu")
        self.device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        self._compute, self._wide = DTYPES[self.dtype], torch.float64 if self.dtype == "float64" else torch.float32
        self._run, self._config, self._train = config, config.model, config.train
        self._exact = self.dtype == "float64" if options.exact is None else options.exact
        self._table = param_table(config.model)
        self._model = Model(config.model, self._exact).to(self._device, self._wide)
        self._params = dict(self._model.named_parameters())
        check_arrays(weights, {name: tuple(p.shape) for name, p in self._params.items()}, "weights for the torch model")
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._in_flight: deque[Pending] = deque()
        self._traces = 0
        self.load_params(weights)
        self._slots = optimizer_slots(config.model, config.train)
        self._state = {
            name: torch.zeros(shape, dtype=self._wide, device=self._device) for name, shape in self._slots.items()
        }
        wanted = options.compile if options.compile is not None else gpu
        self._objective = torch.compile(self._losses, backend=self._count, dynamic=False) if wanted else self._losses
        self._finish = torch.compile(self._update, backend=self._count, dynamic=False) if wanted else self._update
        self.notes = (
            f"compile: {'loss and update (torch.compile)' if wanted else 'off (eager)'}",
            f"attention: {'exact, composed' if self._exact else 'torch scaled_dot_product_attention'}",
        )

    # What is compiled on a GPU.

    def _count(self, graph, inputs):
        """Compile as torch.compile's default does, and count it: a counter inside the traced code would be a guard."""
        self._traces += 1
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    def _losses(self, tokens, targets, tables):
        nll, total = ops.cross_entropy(self._model(tokens, tables, self._compute), targets, self._exact)
        loss = torch.mean(nll)
        return loss + self._train.z_loss * torch.mean(torch.square(total)) if self._train.z_loss else loss, loss

    def _gradient(self, tokens, targets):
        """Return (objective, loss, gradients) of one micro-batch."""
        objective, loss = self._objective(tokens, targets, self._rope(tokens.shape[1]))
        grads = torch.autograd.grad(objective, [self._params[name] for name in self._table])
        return objective.detach(), loss.detach(), dict(zip(self._table, grads, strict=True))

    @torch.no_grad()
    def _update(self, params, state, grads, loss, hyper, count):
        """Return (mean loss, norm, finite) after one clipped and guarded update of params and state, in place."""
        if count != 1:  # CUDA: eager torch would walk all gradients once more for nothing
            loss, grads = loss / count, {name: g / count for name, g in grads.items()}
        norm = optim.global_norm(grads.values())
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        scale = optim.clip_scale(norm, self._train.clip)
        grads = {name: g * scale for name, g in grads.items()}
        new = optim.update(self._run, params, state, grads, dict(zip(NUMBERS, hyper, strict=True)))
        for fresh, stale in zip(new, (params, state), strict=True):
            for name, value in stale.items():  # CUDA: in place, so that the model keeps its tensors
                value.copy_(torch.where(finite, fresh[name], value))
        return loss, norm, finite

    def _forward(self, tokens, record=None):
        return self._model(tokens, self._rope(tokens.shape[1]), self._compute, record)

    # The protocol.

    def train_step(self, batch: Batch, plan: StepPlan) -> Pending:
        hyper = torch.tensor(plan.numbers, dtype=self._wide).to(self._device, non_blocking=True)
        rows = self._train.rows
        count = len(batch.tokens) // rows
        loss, grads = None, {}
        for i in range(0, len(batch.tokens), rows):
            tokens, targets = self._move(batch.tokens[i : i + rows]), self._move(batch.targets[i : i + rows])
            _, new, more = self._gradient(tokens, targets)
            loss, grads = (
                (new, more) if loss is None else (loss + new, {name: grads[name] + more[name] for name in grads})
            )
        numbers = self._finish(self._params, self._state, grads, loss, hyper, float(count))
        self._in_flight.append(Pending(*numbers, self._mark()))
        if len(self._in_flight) > IN_FLIGHT:
            done = self._in_flight.popleft().done
            if done is not None:
                done.synchronize()
        return self._in_flight[-1]

    def gradients(self, batch: Batch) -> tuple[float, Arrays]:
        objective, _, grads = self._gradient(self._move(batch.tokens), self._move(batch.targets))
        return objective.item(), {name: g.cpu().numpy() for name, g in grads.items()}

    @torch.no_grad()
    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        logits = self._forward(self._move(tokens))
        return ops.cross_entropy(logits, self._move(targets), self._exact)[0].cpu().numpy()

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._forward(self._move(tokens)).cpu().numpy()

    @torch.no_grad()
    def activations(self, tokens: np.ndarray) -> Arrays:
        record = {}
        self._forward(self._move(tokens), record)
        return {name: value.to(self._wide).cpu().numpy() for name, value in record.items()}

    def params(self) -> Arrays:
        return {name: self._params[name].detach().cpu().numpy().copy() for name in self._table}

    @torch.no_grad()
    def load_params(self, params: Arrays) -> None:
        check_arrays(params, {name: row.shape for name, row in self._table.items()}, "weights")
        for name in self._table:
            self._params[name].copy_(torch.from_numpy(np.ascontiguousarray(params[name])))

    def optimizer(self) -> Arrays:
        return {name: value.cpu().numpy().copy() for name, value in self._state.items()}

    def load_optimizer(self, state: Arrays) -> None:
        check_arrays(state, self._slots, "optimizer state")
        for name in self._slots:
            self._state[name].copy_(torch.from_numpy(np.ascontiguousarray(state[name])))

    def matmul_rate(self, n: int, repeats: int) -> float:
        a = torch.full((n, n), 0.5, dtype=self._compute, device=self._device)
        best = float("inf")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.matmul(a, a)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return 2 * n**3 / best

    def stats(self) -> dict[str, float]:
        if self._device.type == "cuda":
            memory = {
                "peak_bytes": float(torch.cuda.max_memory_allocated()),
                "active_bytes": float(torch.cuda.memory_allocated()),
            }
        else:  # CUDA: on the CPU only the whole process can be measured (in bytes on macOS, kilobytes elsewhere)
            unit = 1 if sys.platform == "darwin" else 1024
            memory = {"process_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
        return {**memory, "traces": float(self._traces)}

    def _rope(self, seq):
        if seq not in self._tables:
            tables = rope_tables(seq, self._config.rope_dims, self._config.rope_base)
            self._tables[seq] = tuple(torch.tensor(t, dtype=self._wide, device=self._device) for t in tables)  # pyright: ignore
        return self._tables[seq]

    def _move(self, array):
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32))
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def _mark(self):
        """Return an event after the work queued so far, or None where the device runs in step with the host."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def build(config, weights: Arrays, options: EngineOptions) -> Engine:
    """Return the engine of `config` with `weights`."""
    return Engine(config, weights, options)
