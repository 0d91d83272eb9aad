"""Two lanes: from some layer on attention reads one stream, the MLP another, and both write both."""

from dataclasses import dataclass, replace

from core.checks import require
from core.model.table import Model, Part, Rows, vector


@dataclass(frozen=True)
class Lanes(Part):
    """Split the stream into two lanes from some layer on, and take their mean behind the last."""

    start: int | None = None
    """Layer (from 0) from which on the stream is two lanes: attention reads one, the MLP the other, and both are added
    to both through learned weights; their mean leaves the last layer. None: one stream throughout."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        start, most = self.start, model.layers - 1
        if start is None:
            return
        given = f"model.lanes.start={start}"
        require(0 <= start <= most, f"{given}: expected a layer from 0 to {most}")
        where = f"{given}: the layers of lanes share no weights; leave out model.shared_blocks={model.shared_blocks}"
        require(model.shared_blocks is None, where)
        for i in range(start, min(model.layers, start + len(model.blocks))):  # kinds come again after so many
            where = f"{given}: layer {i} is of kind {model.kind(i)}, expected attention layers from there on"
            require(model.kind(i) == "attention", where)
        again = model.repeat_layers
        where = f"{given}: model.repeat_layers={again} must end before it, passes are not repeated in lanes"
        require(all(i < start for i in again), where)
        where = f"{given}: model.engram.layer={model.engram.layer} would add to one lane only; put it before the lanes"
        require(model.engram.orders == 0 or model.engram.layer < start, where)
        half, at = model.layers // 2, model.bank.at
        where = f"{given}: model.bank.at={at} would add to one lane only, in front of layer {half}; begin behind it"
        require("middle" not in model.bank.places or half < start, where)

    def rows(self, model: Model) -> Rows:
        """Return the parameters: for every layer, those before the lanes included, the weights (mixer or MLP, lane)
        with which branches are added, and the share of each lane that is kept.
        """
        return {"write": vector(model.layers, 2, 2, init=1.0), "keep": vector(model.layers, 2, init=1.1)}

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return 2 * model.dim

    def mini(self, model: Model, dim: int) -> "Lanes":
        """Return settings whose lanes begin at the last of 4 layers, if they begin later."""
        return self if self.start is None else replace(self, start=min(self.start, 3))
