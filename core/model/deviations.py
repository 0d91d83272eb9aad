"""Grids by deviations: the scale of a group of weights out of their spread, not out of the largest (docs/model.md)."""

import dataclasses
from dataclasses import dataclass

from core.checks import require
from core.model.storage import gridded
from core.model.table import Model

LEAST, MOST = 1.0, 1000.0


@dataclass(frozen=True)
class Deviations:
    """Round weights to steps of so many of their standard deviations; what is further out is clipped."""

    mlp: float | None = None
    """Standard deviations of a group of weights that the largest code stands for, in the matrices of MLPs; None: the
    largest code stands for the group's largest weight."""
    attention: float | None = None
    """The same in all other matrices: those of mixers of any kind, of memories and of the bank."""
    table: float | None = None
    """The same in all that model.embedding.storage stores."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for a factor out of bounds, or of weights that have no grid."""
        for field in dataclasses.fields(self):
            where = "embedding.storage" if field.name == "table" else "matrix_storage"
            storage = model.embedding.storage if field.name == "table" else model.matrix_storage
            factor, given = getattr(self, field.name), f"model.deviations.{field.name}={getattr(self, field.name)}"
            good = factor is None or LEAST <= factor <= MOST
            require(good, f"{given}: expected from {LEAST:g} to {MOST:g}; without it the largest weight decides")
            require(
                factor is None or gridded(storage),
                f"{given}: model.{where}={storage} has no steps of equal size: take int4 to int8, or leave it out",
            )
