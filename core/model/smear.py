"""Smear: every token's embedding knows a little of the token before (docs/model.md)."""

from dataclasses import dataclass, replace
from typing import Literal

from core.checks import require
from core.model.table import Model, Part, Rows, State, vector


@dataclass(frozen=True)
class Smear(Part):
    """Mix a learned share of the previous token's embedding into every token's."""

    on: bool = False
    """Mix a learned share of the token before into every token's embedding."""
    form: Literal["channel", "window", "lerp"] = "channel"
    """channel: add a share per channel, which starts near 0. window: add a share per token, a factor that starts at 0
    times a gate that reads some channels of the token. lerp: a share per channel, which starts at 1/2 and which the
    token itself gives up."""
    width: int = 12
    """Channels that the gate of the form window reads, the first ones."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        windowed, where = self.on and self.form == "window", f"model.smear.width={self.width}"
        used = self.on or self.form == "channel"
        require(used, f"model.smear.form={self.form}: there is no smear; set model.smear.on, too")
        used = windowed or self.width == Smear.width
        require(used, f"{where}: only the form window reads so many channels; set model.smear.form=window, too")
        good = not windowed or 1 <= self.width <= model.dim
        require(good, f"{where}: expected from 1 to the {model.dim} channels of the stream (model.dim)")

    def rows(self, model: Model) -> Rows:
        """Return the parameters."""
        if self.form == "window":  # one zero factor: sigmoid(0) is 1/2, so that the scale has a gradient at once
            return {"gate": vector(self.width), "scale": vector(1)}
        # sigmoid(-3) = 0.05: almost nothing at the start
        return {"share": vector(model.dim, init=-3.0 if self.form == "channel" else 0.0)}

    def state(self, model: Model) -> State:
        """Return the size of the decoding state: the last token's embedding."""
        return State(model.dim)

    def tape(self, model: Model) -> int:
        """Return the size of a token's embedding."""
        return model.dim

    def mini(self, model: Model, dim: int) -> "Smear":
        """Return settings whose gate reads no more channels than there are."""
        return replace(self, width=min(self.width, dim)) if self.form == "window" else self
