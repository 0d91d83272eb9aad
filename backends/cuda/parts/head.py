"""The head: what becomes of the products with the embedding's vectors."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.linear import Matrix


class Head(Matrix):
    """Make logits: vectors of its own, a bias, a soft cap. Letters: B rows, T positions, V vocabulary, E their width.

    An untied head's weight (V, E) is what its vectors have beside the embedding's.
    """

    def __init__(self, config, exact):
        super().__init__()
        self._cap, self._exact, self._biased = config.head.softcap, exact, config.head.bias
        self._untied = config.head.untied
        if self._untied:
            self.weight = nn.Parameter(torch.zeros(config.vocab, config.embedding.dim or config.dim))
        if config.norm_gains:
            self.norm_gain = nn.Parameter(torch.zeros(config.dim))
        if self._biased:
            self.bias = nn.Parameter(torch.zeros(config.vocab))

    def vectors(self, embed_VE, hidden_BTE, training):
        """Return the vectors that `hidden_BTE` is multiplied by: until a run unties them (Training) the embedding's."""
        if not self._untied:
            return embed_VE
        self.watch(hidden_BTE)
        share = 1.0 if training is None or training.untied is None else training.untied
        return embed_VE + share * self.weight

    def forward(self, logits_BTV):
        """Return logits with bias and softcap, float32 or wider: a token's probability needs more than 16 bits."""
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        logits_BTV = logits_BTV + self.bias if self._biased else logits_BTV
        return logits_BTV if self._cap is None else ops.softcap(logits_BTV, self._cap, self._exact)
