"""How a backend is chosen and an engine is built on it."""

import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np

from core.config import ConfigError, RunConfig
from core.engine.measured import Measured
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Arrays, EngineOptions
from core.engine.ranks import Alone, Ranks

BACKENDS = {"mlx": "mlx.core", "cuda": "torch"}
EXTRAS = {"mlx": "mlx", "cuda": "torch"}


def available_backends() -> list[str]:
    """Return the backends whose framework is installed, without importing it."""
    installed = []
    for name, module in BACKENDS.items():
        try:
            if importlib.util.find_spec(module) is not None:
                installed.append(name)
        except ModuleNotFoundError:
            continue
    return installed


def choose_backend(name: str) -> str:
    """Resolve `auto` to the backend that suits this machine, or check that `name` can be loaded.

    `auto` takes MLX where it has a GPU (a Mac) and the PyTorch backend elsewhere, if installed; `torch` is `cuda`.
    """
    import sys

    name = "cuda" if name == "torch" else name
    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"backend {name!r}: expected one of auto, {', '.join(BACKENDS)}")
    installed = available_backends()
    if name == "auto":
        order = ("mlx", "cuda") if sys.platform == "darwin" else ("cuda", "mlx")
        name = next((n for n in order if n in installed), order[0])
    if name not in installed:
        raise ConfigError(f"backend {name!r} is not installed: pip install -e '.[{EXTRAS[name]}]'")
    return name


def load_engine(
    backend: str,
    config: RunConfig,
    weights: Arrays | None = None,
    options: EngineOptions | None = None,
    quantise: bool = False,
    ranks: Ranks | None = None,
) -> Measured:
    """Build the model of `config` on `backend` with `weights` (None: the start values of config.seed).

    `quantise` is that of `Engine.load_params`; `ranks` are what `core.engine.ranks.join` gave, None: this process.
    """
    from core.model.params import start_values

    name, options = choose_backend(backend), options or EngineOptions()
    if name == "cuda" and options.dtype == "float16":
        raise ConfigError("--dtype float16: is for MLX (M1, M2), expected bfloat16, float32 or float64 with PyTorch")
    if name == "mlx" and options.fast_blas:  # before anything imports MLX
        importlib.import_module("backends.mlx.blas").load_fast_blas()
    module = importlib.import_module(f"backends.{name}.measured")
    if weights is None:
        weights = start_values(config.model, config.seed)
    return module.build(config, weights, options, quantise, ranks or Alone())


class KeptEngine:
    """Loads engines one after the other, and the same one again for a run that differs from the last in its seed alone.

    What an engine has compiled is then used again. It starts as a new one would: bits do not depend on what it did.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._engine: Measured | None = None

    def load(
        self, backend: str, config: RunConfig, weights: Arrays, options: EngineOptions, *, ranks: Ranks
    ) -> Measured:
        """Return what `load_engine` would."""
        key = choose_backend(backend), replace(config, seed=0), options, ranks.world
        if self._engine is None or key != self._key:
            self._engine = None  # before the next one is built: memory may hold one only
            self._engine, self._key = load_engine(backend, config, weights, options, ranks=ranks), key
        else:
            slots = optimizer_slots(config.model, config.train)
            self._engine.load_optimizer({name: np.zeros(shape, np.float32) for name, shape in slots.items()})
            self._engine.load_params(weights)  # last: running averages begin with the weights
        return self._engine
