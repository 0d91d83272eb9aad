"""How a backend is chosen and an engine is built on it."""

import importlib
import importlib.util

from core.config import ConfigError, RunConfig
from core.engine.protocol import Arrays, Engine, EngineOptions
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


def check_dtype(backend: str, dtype: str | None, option: str = "--dtype") -> None:
    """Raise ConfigError for a compute type, given by `option`, that a backend (mlx or cuda) does not have."""
    if backend == "cuda" and dtype == "float16":
        raise ConfigError(f"{option} float16: is for MLX (M1, M2), expected bfloat16, float32 or float64 with PyTorch")


def load_engine(
    backend: str,
    config: RunConfig,
    weights: Arrays | None = None,
    options: EngineOptions | None = None,
    quantise: bool = False,
    ranks: Ranks | None = None,
    module: str = "engine",
) -> Engine:
    """Build the model of `config` on `backend` with `weights` (None: the start values of config.seed).

    `quantise` is that of `Engine.load_params`; `ranks` are what `core.engine.ranks.join` gave, None: this process.
    `module` is the backend's file that builds it (core/engine/measured.py).
    """
    from core.model.params import start_values

    name, options = choose_backend(backend), options or EngineOptions()
    check_dtype(name, options.dtype)
    if name == "mlx" and options.fast_blas:  # before anything imports MLX
        importlib.import_module("backends.mlx.blas").load_fast_blas()
    if weights is None:
        weights = start_values(config.model, config.seed)
    loaded = importlib.import_module(f"backends.{name}.{module}")
    return loaded.build(config, weights, options, quantise, ranks or Alone())
