"""Smear: every token's embedding knows a little of the token before (docs/model.md)."""

from dataclasses import dataclass

from core.model.table import Model, Part, Rows, State, vector


@dataclass(frozen=True)
class Smear(Part):
    """Mix a learned share of the previous token's embedding into every token's."""

    on: bool = False
    """Mix a learned share of the token before into every token's embedding, per channel (starts near 0)."""

    def rows(self, model: Model) -> Rows:
        """Return the parameters."""
        return {"share": vector(model.dim, init=-3.0)}  # sigmoid(-3) = 0.05: almost nothing at the start

    def state(self, model: Model) -> State:
        """Return the size of the decoding state: the last token's embedding."""
        return State(model.dim)
