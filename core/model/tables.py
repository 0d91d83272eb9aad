"""Constant tables that the host makes for both backends, so that neither computes its own cos or sin."""

import numpy as np

from core.model.config import ModelConfig


def rope_tables(seq: int, dims: int, base: float, first: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (cos, sin), each (seq, dims / 2) float64, of positions from 0 on.

    With `first` (rows,) each row has its own positions, from there on: (rows, 1, seq, dims / 2), and one row serves all
    where they are in step. Position t turns pair i by t * base^(-2 i / dims).
    """
    positions = np.arange(seq)
    if first is not None:
        positions = positions + (first if np.ptp(first) else first[:1])[:, None, None]
    angles = positions[..., None] * base ** (-np.arange(0, dims, 2) / dims)
    return np.cos(angles), np.sin(angles)


def hadamard(n: int) -> np.ndarray:
    """Return the Walsh-Hadamard matrix (n, n) in Sylvester order, scaled by 1 / sqrt(n): symmetric, its own inverse.

    Entry (i, j) has the sign of (-1)^popcount(i & j); n is a power of two.
    """
    index = np.arange(n)
    odd = np.zeros((n, n), np.int64)
    for bit in range(n.bit_length() - 1):
        odd ^= (index[:, None] & index[None, :]) >> bit & 1
    return (1 - 2 * odd) / np.sqrt(n)


def walsh(n: int) -> np.ndarray:
    """Return the rows of `hadamard(n)` in sequency order: row k changes its sign k times."""
    rows = hadamard(n)
    return rows[np.argsort(np.count_nonzero(np.diff(np.sign(rows)), axis=1), kind="stable")]


def mixer_tables(config: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the recurrent mixers and capsules of a model use: hadamard, walsh, signs (1 x 1 if none).

    `signs` are those of the largest Walsh-Hadamard matrix of stores that look ahead: its corner is any smaller one's.
    """
    recurs, stores = config.mixes("koopman", "skc"), (config.skc, config.bank)
    ahead = [part.store(config).channels for part in stores if part.ahead]
    signs = np.sign(hadamard(max(ahead, default=1)))
    return hadamard(config.koopman.dim if recurs else 1), walsh(config.skc.block if config.stores else 1), signs
