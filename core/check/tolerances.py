"""The one table of limits. Loosening an entry is a commit of its own, with the measured value.

Relative RMS is |a - b| / |b| over all values; where |b| is 0, a must be 0 too.
"""

import numpy as np

P1_EXACT = 1e-11
"""Every op's exact form against the numpy oracle, and gradients backend against backend: float64, relative RMS."""
P1_DIFFERENCE = 1e-7
"""Gradients against directional finite differences: float64, relative."""
P1_FAST = 2e-6
"""Fast form against exact form: float32, relative RMS."""
P2_FLOAT64 = 1e-10
"""Logits and gradients of every preset's mini: float64, relative RMS."""
P2_FLOAT32 = 5e-6
"""The same in float32."""
P2_BFLOAT16 = 2e-2
"""Logits of bfloat16 compute against float32, on either backend: relative RMS."""
P2_FLOAT16 = 2.5e-3
"""The same of float16 compute, which has 8 times the digits; MLX only."""
P3_FLOAT64 = 1e-10
"""20 updates of every optimizer rule on given gradients: float64, relative RMS."""
P3_FLOAT32 = 1e-5
"""The same in float32."""
P4_FLOAT64 = 1e-8
"""Loss curves over 50 free-running steps: float64, absolute."""
P4_FLOAT32 = 1e-4
"""The same in float32, for float models."""
P4_TEACHER = 1e-5
"""The same in float32 for models that train with stored weights, both engines given common weights before each step."""
P4_FLIPS = 5e-6
"""Share of their codes and scales that may differ after such a step, over all steps."""
P5_BPB = 1e-6
"""Bits per byte of one artifact, scored by both backends."""
CAUSAL = 1e-11
"""Prefix and batch-neighbour tests: float64, absolute (flip tests allow nothing)."""


def relative_rms(a: np.ndarray, b: np.ndarray) -> float:
    """Return |a - b| / |b| (root mean squares), or |a| where b is 0; NaN anywhere gives inf."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    size = float(np.sqrt(np.mean(b**2))) if b.size else 0.0
    gap = float(np.sqrt(np.mean((a - b) ** 2))) if b.size else 0.0
    return gap / size if size > 0 else gap
