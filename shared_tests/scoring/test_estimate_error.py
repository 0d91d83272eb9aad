"""The error bar of an estimate, checked by drawing many times from a known population. Budget: 5 s."""

import numpy as np
import pytest

from core import rng
from core.scoring.accounting import ratio_error


@pytest.mark.parametrize(
    ("k", "spread", "lowest"), [(4, 0.3, 0.78), (8, 1.0, 0.65), (32, 0.3, 0.92), (32, 1.0, 0.85), (400, 1.0, 0.92)]
)
def test_error_bar_is_right(k: int, spread: float, lowest: float) -> None:
    """Log-normal document lengths; the cost per byte varies with the document and falls with its length.

    The standard error must match the spread of the estimates. Few or very unequal documents make the estimate's own
    distribution heavy-tailed, so 1.96 errors then cover the truth less than 95 % of the time (a t quantile would help).
    """
    documents, draws = 600, 400
    noise = rng.normal(0, "documents", 2 * documents).reshape(2, documents)
    counts = np.ceil(np.exp(7 + spread * noise[0]))
    nats = counts * (0.8 + 0.06 * noise[1] - 0.05 * spread * noise[0])
    truth = nats.sum() / counts.sum()
    estimates, errors = np.empty(draws), np.empty(draws)
    for seed in range(draws):
        drawn = rng.choose(seed, "eval/documents", documents, k)
        estimates[seed] = nats[drawn].sum() / counts[drawn].sum()
        errors[seed] = ratio_error(nats[drawn], counts[drawn], documents)
    coverage = (np.abs(estimates - truth) <= 1.96 * errors).mean()
    assert lowest <= coverage <= 0.98
    assert abs(estimates.mean() - truth) < 0.3 * estimates.std(), "the bias of a ratio falls as 1 / k"
    assert np.sqrt((errors**2).mean()) == pytest.approx(estimates.std(), rel=0.12)


def test_error_needs_spread() -> None:
    assert ratio_error(np.array([3.0, 5.0]), np.array([0, 7]), 9) is None
