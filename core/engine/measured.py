"""What only checks and benchmarks ask of an engine, beside what the lab asks (core/engine/protocol.py)."""

from typing import Any, Protocol

import numpy as np

from core.config import RunConfig
from core.data.batch import Batch
from core.engine.loading import load_engine
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, Engine


class Measured(Engine, Protocol):
    """An engine whose insides can be looked at and timed."""

    def gradients(self, batch: Batch, softness: float | None = None) -> tuple[float, Arrays]:
        """Return the training loss (z-loss included) and its gradient by parameter name, without an update.

        With `quantise` it is the gradient at the stored weights, which the step gives to the weights as it is: the
        straight-through estimator (Bengio et al. 2013). With `softness` weights are rounded softly, by that sharpness.
        """
        ...

    def activations(self, tokens: np.ndarray) -> Arrays:
        """Return the residual stream after the embedding and after every stage, and the logits, by name."""
        ...

    def routes(self, tokens: np.ndarray) -> np.ndarray:
        """Return the experts of every token in every pass through some, best first: (passes, B, T, k) int."""
        ...

    def matmul_rate(self) -> tuple[int, float]:
        """Measure (n, FLOP/s of (n, n) @ (n, n)) in the compute type, n as large as fills the device: at best on a CPU,
        in a row on a GPU.
        """
        ...

    def update_seconds(self, plan: StepPlan, repeats: int) -> float:
        """Measure this rank's optimizer update alone (clip, rules, averages, finiteness guard): the mean of `repeats`.

        It runs on stand-in gradients and leaves weights and optimizer state as they are. A mean, as steps are timed:
        the best of several would flatter the update's share of a step on a busy machine.
        """
        ...


def load_measured(
    backend: str, config: RunConfig, weights: Arrays | None = None, *given: Any, **options: Any
) -> Measured:
    """Build an engine as `load_engine` does, with the rest of its arguments; its insides can be looked at and timed."""
    engine: Any = load_engine(backend, config, weights, *given, **options, module="measured")
    return engine
