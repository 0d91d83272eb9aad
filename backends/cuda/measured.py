"""The PyTorch engine with what only checks and benchmarks ask of it; the MLX file's twin."""

import time

import numpy as np
import torch

from backends.cuda import engine
from backends.cuda.banks import Banked
from backends.cuda.distributed import Reducer
from core.data.batch import Batch
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, EngineOptions


class Measured(engine.Engine):
    """See core.engine.measured.Measured for every public method."""

    def gradients(self, batch: Batch, softness: float | None = None) -> tuple[float, Arrays]:
        weights, slopes = self._trained(self._params, self.quantise), {}
        if softness is not None:
            weights, slopes = self._softened(self._params, softness)
        objective, _, grads = self._gradient(weights, batch, slice(None), True)
        named = Banked({(bank, ""): slope for bank, slope in slopes.items()})
        grads = {name: g * named[name] if name in named else g for name, g in grads.items()}
        return objective.item(), {name: g.cpu().numpy() for name, g in grads.items()}

    @torch.no_grad()
    def activations(self, tokens: np.ndarray) -> Arrays:
        record = {}
        self._read(tokens, record=record)
        del record["routes"]
        return {name: value.to(self._wide).cpu().numpy() for name, value in record.items()}

    @torch.no_grad()
    def routes(self, tokens: np.ndarray) -> np.ndarray:
        record: dict = {}
        self._read(tokens, record=record)
        return np.array([route.cpu().numpy() for route in record["routes"]])

    def matmul_rate(self) -> tuple[int, float]:
        gpu = self._device.type == "cuda"
        n, repeats = (8192, 20) if gpu else (1024, 5)
        # CUDA: not a constant, which a GPU multiplies faster than what models hold: it takes less power
        a = torch.randn((n, n), device=self._device).to(self._compute)
        torch.matmul(a, a)
        if not gpu:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                torch.matmul(a, a)
                times.append(time.perf_counter() - start)
            return n, 2 * n**3 / min(times)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):  # CUDA: one after the other without waiting: a launch takes as long as a small product
            torch.matmul(a, a)
        end.record()
        end.synchronize()
        return n, 2e3 * n**3 * repeats / begin.elapsed_time(end)

    def update_seconds(self, plan: StepPlan, repeats: int) -> float:
        hyper, count = self._numbers(plan.numbers), self._numbers(self._train.batch // self._train.rows)
        key, loss = torch.Generator(self._device).manual_seed(0), torch.ones((), dtype=self._wide, device=self._device)
        grads = {name: torch.empty_like(p).normal_(generator=key) for name, p in self._params.items()}
        # CUDA: an update works in place: it gets copies
        params, state, start = self._params.map(torch.clone), self._state.map(torch.clone), 0.0
        for turn in range(repeats + 1):
            if turn == 1:  # the first one compiles
                start = time.perf_counter()
            self._updated(params, state, grads, loss, hyper, count)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    def _updated(self, params, state, grads, loss, hyper, count):
        """Update params and state in place, with what this rank does of it where there are others."""
        if self.ranks.world == 1:
            self._finish(params, state, grads, loss, hyper, count)
            return
        reducer = Reducer(self.ranks, self._buckets, self._wire)
        for name, grad in grads.items():
            reducer.add(name, grad)
        self._update.together(params, state, reducer, loss, hyper, count)


def build(config, weights: Arrays, options: EngineOptions, quantise: bool, ranks) -> Measured:
    """Return an engine as backends/cuda/engine.py builds it."""
    return engine.build(config, weights, options, quantise, ranks, Measured)
