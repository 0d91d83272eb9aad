"""The bank: a store of token vectors, each under the routing of the token before it (docs/model.md)."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from core.checks import require, require_least
from core.model.capsules import Store
from core.model.koopman import require_power
from core.model.table import Model, Part, Rows, State, below, matrix, require_times, vector

PLACES = {"none": (), "head": ("head",), "middle": ("middle",), "both": ("middle", "head")}


@dataclass(frozen=True)
class Bank(Part):
    """Read what followed contexts like this one."""

    at: Literal["none", "head", "middle", "both"] = "none"
    """Associative store of token vectors, keyed by the token before: read in front of the head, between the two halves
    of the layers, or at both places."""
    heads: int = 4
    """Capsule heads; each stores dim / heads channels."""
    capsules: int = 16
    """Capsules per head; blocks have skc.block tokens."""
    times: tuple[float, float] = (1.5, 64.0)
    """Start values of the time constants, in blocks: the shortest and the longest."""
    gate: float = 0.2
    """Start value of the gain per channel on what is read."""
    ahead: bool = False
    """A read also shows what a learned linear step makes of each capsule, as in model.skc.ahead."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.bank", self, 1, "capsules", "heads")
        require_times("model.bank.times", self.times)
        where = f"model.dim={model.dim} is not divisible by model.bank.heads={self.heads}"
        require(self.at == "none" or model.dim % self.heads == 0, where)
        where = f"model.bank.at={self.at} stands between two halves of the layers, but model.layers={model.layers}"
        require("middle" not in self.places or model.layers >= 2, where)
        require(bool(self.places) or not self.ahead, f"model.bank.ahead={self.ahead}: model.bank.at=none has no store")
        if self.ahead:
            require_power("model.bank.ahead: model.dim / model.bank.heads", self.store(model).channels)

    @property
    def places(self) -> tuple[str, ...]:
        """The places where the bank is read, in the order of the forward pass."""
        return PLACES[self.at]

    def store(self, model: Model) -> Store:
        """Return the store of one place: its keys are shifted, and the open block is read too."""
        # Without the shift it would store what a token looks like, which the token knows.
        options = (True, 1.0, model.skc.bands, self.ahead, self.times)
        return Store(model.dim, self.heads, self.capsules, model.skc.block, *options)

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one place."""
        routes = self.heads * self.capsules
        return {
            "route.weight": matrix(model, routes, model.dim),
            "write_bias": vector(routes),
            **below("capsules", self.store(model).rows()),
            "gate": vector(model.dim, init=self.gate),
        }

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of one place."""
        return self.store(model).flops()

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return 8 * model.dim

    def state(self, model: Model) -> State:
        """Return the size of the decoding state of one place."""
        return self.store(model).state()

    def tape(self, model: Model) -> int:
        """Return the size of what one place keeps of every token."""
        return self.store(model).tape()

    def mini(self, model: Model, dim: int) -> "Bank":
        """Return settings of at most 4 capsules per head."""
        return replace(self, capsules=min(self.capsules, 4), heads=math.gcd(self.heads, dim))
