"""The integers that a training step's noise is drawn by: with core.rng.hash32 they give all backends the same bits.

The key of a step is an argument of compiled code; what it is combined with are constants. Indices are those of the
whole step or weight, so that ranks and micro-batches draw what one process does.
"""

from collections.abc import Sequence

import numpy as np

from core.rng import hash_key

DEVIATION = 147.8
"""Standard deviation of the sum of four random bytes."""
DIGITS = 2.0**12
"""A sum of four bytes (10 bits) times a number of so many values is exact in float32: no fused operation rounds it."""


def step_key(seed: int, step: int) -> int:
    """Return the uint32 key of a step's noise."""
    return hash_key(seed, step, "noise")


def depth_keys(passes: int) -> np.ndarray:
    """Return a key for the mixer and one for the MLP of every pass through layers, (S, 2) uint32."""
    keys = [[hash_key(0, 0, f"depth/{s}/{branch}") for branch in ("mixer", "mlp")] for s in range(passes)]
    return np.array(keys, np.uint32)


def weight_keys(names: Sequence[str]) -> np.ndarray:
    """Return a key for every parameter, (N,) uint32."""
    return np.array([hash_key(0, 0, name) for name in names], np.uint32)


def byte_scale(deviation: float) -> float:
    """Return what a centred sum of four bytes is multiplied by, to have about that deviation, in DIGITS' precision."""
    mantissa, exponent = np.frexp(deviation / DEVIATION)
    return float(np.ldexp(np.round(mantissa * DIGITS) / DIGITS, exponent))
