"""How near a twin is to its model."""

from dataclasses import dataclass

import numpy as np

BETAS, EPS = (0.9, 0.95), 1e-8
"""AdamW's, of a twin."""


@dataclass(frozen=True)
class TwinReport:
    """A twin's rows beside the model's at the same places of a text, which sees all that the twin does not."""

    agreement: np.ndarray
    """(K,): share of blocks in which both name the same likeliest token, by place."""
    kl: np.ndarray
    """(K,): mean nats of KL(model || twin), by place."""
    cosine: dict[str, float]
    """By pass through a layer: mean cosine of what both mixers put out, over the places that the twin reads."""
