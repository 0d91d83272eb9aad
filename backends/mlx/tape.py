"""The read-only half of a decoded chunk, on the device until it is asked for; the PyTorch tape's twin."""

import mlx.core as mx
import numpy as np

from backends.mlx import ops


class Tape:
    """See core.engine.protocol.Tape."""

    def __init__(self, before, tokens, logits, model, exact):
        self.before, self.tokens, self.model = before, tokens, model
        self._logits, self._exact = logits, exact

    def logits(self) -> np.ndarray:
        return np.array(self._logits)

    def best(self) -> np.ndarray:
        return np.array(mx.argmax(self._logits, axis=-1))

    def nll(self, targets: np.ndarray) -> np.ndarray:
        return np.array(ops.cross_entropy(self._logits, mx.array(targets), self._exact)[0])
