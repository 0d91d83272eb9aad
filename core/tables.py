"""Constant tables that the host makes for both backends, so that neither computes its own cos or sin."""

import numpy as np


def rope_tables(seq: int, dims: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (cos, sin), each (seq, dims / 2) float64: position t turns pair i by t * base^(-2 i / dims)."""
    angles = np.arange(seq)[:, None] * base ** (-np.arange(0, dims, 2) / dims)[None, :]
    return np.cos(angles), np.sin(angles)
