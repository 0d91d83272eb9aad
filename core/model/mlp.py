"""The MLP that follows every mixer, or stands beside it."""

from dataclasses import dataclass, replace
from typing import Literal

from core.checks import require_least
from core.model.table import Model, Part, Rows, matrix, output


@dataclass(frozen=True)
class MLP(Part):
    """Change every position by itself: down(activation(up(x))), or down(silu(gate(x)) * up(x))."""

    hidden: int = 1024
    """Hidden width."""
    activation: Literal["relu2", "leaky_relu2", "swiglu"] = "relu2"
    """relu(x)^2, LeakyReLU(0.5)(x)^2, or silu(gate(x)) * up(x), which takes half as many weights more."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.mlp", self, 1, "hidden")

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one layer."""
        k = model.deviations.mlp
        up = matrix(model, self.hidden, model.dim, deviation=k)
        gate = {"gate.weight": up} if self.activation == "swiglu" else {}
        return {**gate, "up.weight": up, **output(model, "down", self.hidden, deviation=k)}

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return (4 if self.activation == "swiglu" else 2) * self.hidden

    def mini(self, model: Model, dim: int) -> "MLP":
        """Return settings of the same width, measured by the stream's."""
        return replace(self, hidden=max(1, self.hidden * dim // model.dim))
