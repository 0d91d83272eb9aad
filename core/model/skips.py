"""U-net skips: what the first half of the layers put out is added again in the second half."""

from dataclasses import dataclass

from core.model.table import Model, Part, Rows, vector


@dataclass(frozen=True)
class Skips(Part):
    """Add what layers of the first half put out to the input of layers of the second half."""

    on: bool = False
    """The first half of the layers push their outputs, the second half add them back, scaled (last in, first out)."""

    def count(self, model: Model) -> int:
        """Return how many layers push; of one layer, none."""
        # Of an odd number of layers the one in the middle neither pushes nor adds.
        return model.layers // 2 if self.on else 0

    def rows(self, model: Model) -> Rows:
        """Return the parameters: a scale per channel and skip."""
        return {"weight": vector(self.count(model), model.dim, init=1.0)}
