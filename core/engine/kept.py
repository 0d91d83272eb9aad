"""One engine for several runs, so that what it has compiled is used again."""

from dataclasses import replace
from typing import Any

import numpy as np

from core.config import RunConfig
from core.engine.loading import choose_backend, load_engine
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Arrays, Engine, EngineOptions
from core.engine.ranks import Ranks


class KeptEngine:
    """Loads engines one after the other, and the same one again for a run that differs from the last in its seed alone.

    What an engine has compiled is then used again. It starts as a new one would: bits do not depend on what it did.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._engine: Engine | None = None

    def load(self, backend: str, config: RunConfig, weights: Arrays, options: EngineOptions, *, ranks: Ranks) -> Engine:
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
