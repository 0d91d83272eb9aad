"""The MLX engine with what only checks and benchmarks ask of it; the PyTorch file's twin."""

import time

import mlx.core as mx
import numpy as np

from backends.mlx import engine
from core.data.batch import Batch
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, EngineOptions


class Measured(engine.Engine):
    """See core.engine.measured.Measured for every public method."""

    def gradients(self, batch: Batch, softness: float | None = None) -> tuple[float, Arrays]:
        weights, slopes = self._trained(self._params, self.quantise), {}
        if softness is not None:
            weights, slopes = self._softened(self._params, softness)
        objective, _, grads = self._gradient(
            weights, mx.array(batch.tokens), mx.array(batch.targets), self._constants(batch.tokens.shape[1]), True
        )
        grads = {key: grad * slopes[key] if key in slopes else grad for key, grad in grads.items()}
        return float(np.array(objective)), self._to_host(grads)

    def activations(self, tokens: np.ndarray) -> Arrays:
        record = {}
        self._forward(self._scored(), mx.array(tokens), self._constants(tokens.shape[1]), record=record)
        del record["routes"]
        return {name: np.array(value.astype(self._wide)) for name, value in record.items()}

    def routes(self, tokens: np.ndarray) -> np.ndarray:
        record: dict = {}
        self._forward(self._scored(), mx.array(tokens), self._constants(tokens.shape[1]), record=record)
        return np.array([np.array(route) for route in record["routes"]])

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
                mx.eval(self._update.together(self._params, self._state, grads, loss, hyper, count))
        return (time.perf_counter() - start) / repeats


def build(config, weights: Arrays, options: EngineOptions, quantise: bool, ranks) -> Measured:
    """Return an engine as backends/mlx/engine.py builds it."""
    return engine.build(config, weights, options, quantise, ranks, Measured)
