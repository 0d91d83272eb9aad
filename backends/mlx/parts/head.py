"""The head: what becomes of the products with the embedding's vectors."""

import mlx.core as mx
import mlx.nn as nn

from backends.mlx import ops


class Head(nn.Module):
    """Make logits: a bias, and a soft cap. Letters: B rows, T positions, V vocabulary."""

    def __init__(self, config, exact):
        super().__init__()
        self._cap, self._exact, self._biased = config.head.softcap, exact, config.head.bias
        if self._biased:
            self.bias = mx.zeros((config.vocab,))

    def __call__(self, logits_BTV):
        """Return logits with bias and softcap, float32 or wider: a token's probability needs more than 16 bits."""
        if logits_BTV.dtype.size == 2:
            logits_BTV = logits_BTV.astype(mx.float32)
        logits_BTV = logits_BTV + self.bias if self._biased else logits_BTV
        return logits_BTV if self._cap is None else ops.softcap(logits_BTV, self._cap, self._exact)
