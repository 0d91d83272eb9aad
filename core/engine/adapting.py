"""What an update of adapters, or of whole weights, is asked for while a text is scored."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from core.engine.ranks import Ranks
from core.model.table import Rows


class AdaptStep(NamedTuple):
    """How adapters of rows, or whole weights, are updated once."""

    rule: Literal["adamw", "sgd"] = "adamw"
    lr: float | np.ndarray = 1e-3  # one number, or (rows,)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    momentum: float = 0.9
    clip: float = 0.0  # largest norm of the gradient of a row; 0: none
    taken: int | np.ndarray = 0  # (rows,): updates so far

    @property
    def constants(self) -> tuple:
        """What is the same for all rows."""
        return self.rule, self.beta1, self.beta2, self.eps, self.decay, self.momentum, self.clip

    def by_row(self, rows: int) -> list[np.ndarray]:
        """Return the learning rate and what AdamW divides the two moments by, (rows,) float64 each."""
        count = np.broadcast_to(np.asarray(self.taken, np.float64), (rows,)) + 1
        lr = np.broadcast_to(np.asarray(self.lr, np.float64), (rows,))
        return [np.array(lr), 1 - self.beta1**count, 1 - self.beta2**count]


def check_descent(table: Rows, names: Iterable[str], step: AdaptStep | None = None) -> None:
    """Raise ValueError for names of weights that are not in the table, or for an update that is no SGD."""
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"{unknown[0]} is not a parameter of this model")
    if step is not None and step.rule != "sgd":
        raise ValueError(f"weights learn by sgd while a text is scored, not by {step.rule}")


def learning_rows(shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the rows with some share that is not 0, (rows,) bool; a ValueError for shares that do not fit `tokens`."""
    if shares.shape != tokens.shape or not np.isfinite(shares).all():
        raise ValueError(f"adapt: shares {shares.shape}; expected one finite number for every one of {tokens.shape}")
    return (shares != 0).any(axis=1)


def target_shares(targets: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Return each target's weight in the mean over all ranks' targets, (rows, seq); of pads, which are -1, it is 0.

    ValueError if there is no target on any rank.
    """
    real = targets >= 0
    total = sum(int(part[0]) for part in ranks.gather(np.array([real.sum()])))
    if not total:
        raise ValueError("there is no target to learn from: every one of them is a pad")
    return real / total
