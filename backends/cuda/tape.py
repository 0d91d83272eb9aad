"""The read-only half of a decoded chunk, on the device until it is asked for; the MLX tape's twin."""

import numpy as np
import torch

from backends.cuda import ops


class Tape:
    """See core.engine.protocol.Tape."""

    def __init__(self, before, tokens, logits, model, exact):
        self.before, self.tokens, self.model = before, tokens, model
        self._logits, self._exact = logits, exact

    def logits(self) -> np.ndarray:
        return self._logits.cpu().numpy()

    def best(self) -> np.ndarray:
        return torch.argmax(self._logits, dim=-1).cpu().numpy()

    def nll(self, targets: np.ndarray) -> np.ndarray:
        wanted = torch.from_numpy(np.ascontiguousarray(targets, np.int32)).to(self._logits.device)
        return ops.cross_entropy(self._logits, wanted, self._exact)[0].cpu().numpy()
