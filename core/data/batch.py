"""What a training step reads: rows of tokens and the tokens that follow them."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of consecutive tokens and, for each token, the token that follows it."""

    tokens: np.ndarray  # (rows, seq) int32
    targets: np.ndarray  # (rows, seq) int32
    total: int = 0
    """Rows of the step on all ranks together; 0: these."""
    first: int = 0
    """How many of those come before these."""
