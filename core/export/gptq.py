"""GPTQ: codes of a matrix that make up for each other's rounding errors; docs/export.md has the equations.

This is the reference, in float64 numpy; backends/cuda/gptq.py is its twin for a GPU. Letters: R rows, C columns, G
groups of a row.
"""

from typing import Protocol

import numpy as np

from core.engine.protocol import Arrays
from core.model.params import Param
from core.model.storage import LARGEST, Storage, Stored, gridded, group_size, storage_class

BLOCK = 128
"""Columns whose errors reach the columns behind them in one product of matrices."""
TIED = 1.0
"""Least damping of a table that is tied to the head: it is also read row by row, where every error counts as it is."""


class RoundingError(ValueError):
    """The codes of a tensor cannot be chosen: the message names the tensor and what is wrong."""


class Solver(Protocol):
    """What chooses the codes of one matrix."""

    def __call__(
        self, weight: np.ndarray, moment: np.ndarray, scales: np.ndarray, storage: Storage, damping: float
    ) -> np.ndarray:
        """Return (R, C) int8 codes of a weight (R, C), given the second moments (C, C) of what it multiplies."""
        ...


def compensated(
    weight: np.ndarray, moment: np.ndarray, scales: np.ndarray, storage: Storage, damping: float
) -> np.ndarray:
    """Return the int8 codes (R, C) that GPTQ gives a weight (R, C) on the grid of its float16 `scales` (R, G).

    `moment` (C, C) is the sum or the mean of a a^T of what the matrix multiplies; a column that nothing reaches gets
    the code 0. Quotients are taken in the weight's own type, as plain rounding takes them. RoundingError.
    """
    order, factor_CC = prepared(weight, moment, storage, damping)
    largest, columns = LARGEST[storage_class(storage)], weight.shape[1]
    steps_GR = scales.T.astype(weight.dtype)
    left_CR = weight.T.astype(np.float64)[order]  # what each column has to become, errors of earlier ones taken off
    left_CR[np.diagonal(moment)[order] <= 0] = 0
    codes_CR, groups = np.empty(left_CR.shape, np.int8), order // group_size(storage, columns)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors_bR = np.empty((end - begin, len(weight)))
        for column in range(begin, end):
            done = column - begin
            wanted_R = left_CR[column] - factor_CC[column, begin:column] @ errors_bR[:done]
            step_R = steps_GR[groups[column]]
            code_R = np.clip(np.rint(wanted_R.astype(weight.dtype) / step_R), -largest, largest)
            errors_bR[done] = (wanted_R - code_R * step_R) / factor_CC[column, column]
            codes_CR[column] = code_R
        left_CR[end:] -= factor_CC[end:, begin:end] @ errors_bR
    codes_RC = np.empty(weight.shape, np.int8)
    codes_RC[:, order] = codes_CR.T
    return codes_RC


def prepared(weight: np.ndarray, moment: np.ndarray, storage: Storage, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the columns, largest moment first, and the lower F (C, C) for which H^-1 = F F^T.

    H is the damped moment in that order. With J the reversal, J H J = L L^T makes H = R R^T with R = J L J upper
    triangular, so that F = R^-T: one Cholesky factor and one triangular inverse, and H^-1 itself is never rounded.
    """
    check_solvable(weight, moment, storage)
    sums_C = np.diagonal(moment).astype(np.float64)
    order, alive = np.argsort(-sums_C, kind="stable"), sums_C > 0
    mean = sums_C[alive].mean() if alive.any() else 1.0
    damped_CC = moment.astype(np.float64)[np.ix_(order, order)]
    # A dead column has no products with others; any positive number on the diagonal leaves it alone.
    damped_CC[np.diag_indices_from(damped_CC)] += np.where(alive[order], damping, 1.0) * mean
    try:
        root_CC = np.linalg.cholesky(damped_CC[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise RoundingError(f"second moments are not positive at damping {damping}: raise export.damping") from error
    return order, np.ascontiguousarray(np.tril(np.linalg.inv(root_CC[::-1, ::-1]).T))


def check_solvable(weight: np.ndarray, moment: np.ndarray, storage: Storage) -> None:
    """Raise RoundingError unless GPTQ can choose the codes of a weight (R, C) with these second moments (C, C)."""
    if not gridded(storage):
        raise RoundingError(f"{storage} has no grid of equal steps: GPTQ is for int storages; take export.method=round")
    if moment.shape != (weight.shape[1],) * 2:
        raise RoundingError(f"second moments of shape {moment.shape}, expected {(weight.shape[1],) * 2}")
    for what, values in (("weights", weight), ("second moments", moment)):
        if not np.isfinite(values).all():
            raise RoundingError(f"{what} are not finite: train again from a sound checkpoint, or on other text")


def compensate(
    stored: dict[str, Stored], weights: Arrays, moments: Arrays, table: dict[str, Param], damping: float, solver: Solver
) -> dict[str, Stored]:
    """Return `stored`, which plain rounding made of `weights`, with GPTQ's codes for every matrix of `moments`.

    Scales stay, and so do tensors without moments. RoundingError names the tensor.
    """
    result = dict(stored)
    for name, moment in moments.items():
        scales = stored[name].scales
        try:
            if scales is None:
                raise RoundingError(f"{table[name].storage} has no grid of equal steps: take export.method=round")
            least = TIED if name == "embed.weight" else 0.0  # of an untied table there are no moments
            codes = solver(weights[name], moment, scales, table[name].storage, max(damping, least))
        except RoundingError as error:
            raise RoundingError(f"{name}: {error}") from error
        result[name] = Stored(codes, scales)
    return result
