"""U-net skips: what the first half of the layers put out is added again in the second half."""

from dataclasses import dataclass
from typing import Literal

from core.checks import require
from core.model.table import Model, Part, Rows, vector


@dataclass(frozen=True)
class Skips(Part):
    """Add what layers of the first half put out to the input of layers of the second half."""

    on: bool = False
    """The first half of the layers push their outputs, the second half add them back, scaled (last in, first out)."""
    gates: bool = False
    """A learned share per channel of what is added back takes the place of that share of the stream (starts at 1/2)."""
    over: Literal["layers", "passes"] = "layers"
    """What is halved: the layers, or all passes through layers, repeats included; then skips pair other passes while
    repeats are off."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        for name in ("gates", "over"):
            given = getattr(self, name)
            where = f"model.skips.{name}={given}: set model.skips.on too, there are no skips"
            require(self.on or given in (False, "layers"), where)
        where = "model.skips.over=passes: model.repeat_layers names none, so that passes are layers; leave it out"
        require(self.over == "layers" or len(model.repeat_layers) > 0, where)

    def count(self, model: Model) -> int:
        """Return how many outputs are pushed at most; of one layer, none."""
        # Of an odd number the last neither pushes nor adds; the first of the second half adds what it was just given.
        repeats = len(model.repeat_layers) * model.repeat_times if self.over == "passes" else 0
        return (model.layers + repeats) // 2 if self.on else 0

    def rows(self, model: Model) -> Rows:
        """Return the parameters: a scale per channel and skip, and a gate."""
        shape = self.count(model), model.dim
        return {"weight": vector(*shape, init=1.0), **({"gate": vector(*shape)} if self.gates else {})}
