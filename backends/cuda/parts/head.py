"""The head: what becomes of the products with the embedding's vectors."""

import torch
import torch.nn as nn

from backends.cuda import ops


class Head(nn.Module):
    """Make logits: a bias, and a soft cap. Letters: B rows, T positions, V vocabulary."""

    def __init__(self, config, exact):
        super().__init__()
        self._cap, self._exact, self._biased = config.head.softcap, exact, config.head.bias
        if self._biased:
            self.bias = nn.Parameter(torch.zeros(config.vocab))

    def forward(self, logits_BTV):
        """Return logits with bias and softcap, float32 or wider: a token's probability needs more than bfloat16."""
        if logits_BTV.dtype == torch.bfloat16:
            logits_BTV = logits_BTV.to(torch.float32)
        logits_BTV = logits_BTV + self.bias if self._biased else logits_BTV
        return logits_BTV if self._cap is None else ops.softcap(logits_BTV, self._cap, self._exact)
