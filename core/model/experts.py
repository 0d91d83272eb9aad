"""Experts: in the upper layers a router sends every token to a few of many MLPs, which stand in the MLP's place."""

import math
from dataclasses import dataclass, fields, replace

from core.checks import require, require_least
from core.model.table import Init, Model, Part, Rows, below, matrix, output, vector

MOST = 256
"""Most experts of a layer: every two of them are compared, token by token."""


@dataclass(frozen=True)
class Experts(Part):
    """Send every token to a few of many MLPs instead of the upper layers' one MLP."""

    FLOPS = "experts 2 * count * dim of the router, less the products with experts that a token is not sent to"

    count: int = 0
    """Experts of a layer; 0: there are none, and every layer has its MLP."""
    active: int = 1
    """Experts that a token is sent to: those of the highest probability, all tokens and whatever other tokens want."""
    hidden: int = 0
    """Hidden width of an expert; the activation is model.mlp.activation."""
    shared: int = 0
    """Hidden width of one more, to which every token is sent; 0: there is none."""
    start: float = 0.5
    """Share of the layers below the first with experts (rounded up); a block that layers share has them if its first
    layer does."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        if self.count == 0:
            for field in fields(self):
                value, where = getattr(self, field.name), f"model.experts.{field.name}"
                idle = f"{where}={value}: there are no experts; set model.experts.count, or leave it out"
                require(value == field.default, idle)
            return
        gated = "model.mlp.activation=swiglu: experts have no gates; take relu2 or leaky_relu2, or leave out experts"
        require(model.mlp.activation != "swiglu", gated)
        count, active, blocks = self.count, self.active, model.shared_blocks or model.layers
        require(2 <= count <= MOST, f"model.experts.count={count}: expected 2 to {MOST}, or 0 for none")
        require(1 <= active <= count, f"model.experts.active={active}: expected 1 to {count}, the number of experts")
        require_least("model.experts", self, 0, "shared")
        require(self.hidden >= 1, f"model.experts.hidden={self.hidden}: expected at least 1, the width of an expert")
        start = f"model.experts.start={self.start}"
        require(0 <= self.start < 1, f"{start}: expected a share from 0 to below 1")
        first = self.first(model)
        require(first < blocks, f"{start}: layer {first} would be the first with experts, of {blocks} blocks; lower it")

    def first(self, model: Model) -> int:
        """Return the first layer with experts, if there are any."""
        return math.ceil(self.start * model.layers - 1e-9)  # 0.28 * 25 is more than 7 by rounding

    def within(self, model: Model, block: int) -> bool:
        """Return whether a block of weights has experts: the first layer that uses it is the layer of its number."""
        return self.count > 0 and block >= self.first(model)

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one layer; the experts' matrices lie one below the other."""
        count, k = self.count, model.deviations.mlp
        down = output(model, "down", self.hidden, deviation=k)
        wide = {"shape": (count * model.dim, self.hidden), "slices": count}
        return {
            "router": vector(count, model.dim, init=Init("normal", 0.02)),
            "up.weight": matrix(model, count * self.hidden, model.dim, slices=count, deviation=k),
            **down,
            "down.weight": down["down.weight"]._replace(**wide),
            **(below("shared", replace(model.mlp, hidden=self.shared).rows(model)) if self.shared else {}),
        }

    def flops(self, model: Model, seq: int) -> int:
        """Return the router's FLOPs less those of the experts that a token is not sent to, whose matrices all count."""
        return 2 * self.count * model.dim - (self.count - self.active) * 2 * 2 * self.hidden * model.dim

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return 2 * (self.active * (self.hidden + model.dim) + self.shared) + 3 * self.count

    def mini(self, model: Model, dim: int) -> "Experts":
        """Return settings of the same widths, measured by the stream's, that begin below the last of 4 layers."""
        if not self.count:
            return self
        hidden, shared = (-(-wide * dim // model.dim) for wide in (self.hidden, self.shared))
        layers = min(model.layers, 4)
        last = min(layers, model.shared_blocks or layers) - 1
        return replace(self, hidden=hidden, shared=shared, start=min(self.start, last / layers))
