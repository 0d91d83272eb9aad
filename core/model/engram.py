"""EngramHash: a gated memory of hashed n-grams (docs/model.md)."""

from dataclasses import dataclass, replace

from core.checks import require, require_least
from core.model.ngrams import MOST_BUCKETS, MOST_HASHES, MULTIPLIERS
from core.model.storage import Storage
from core.model.table import Init, Model, Param, Part, Rows, matrix, vector

MOST_HASHED = 65_536
"""Largest vocabulary whose ids can be hashed so."""


@dataclass(frozen=True)
class Engram(Part):
    """Add rows of hashed n-gram tables to the stream, through a gate."""

    orders: int = 0
    """EngramHash, a hashed n-gram memory: 0 none, 1 bigrams, 2 also trigrams, 3 also 4-grams."""
    heads: int = 4
    """Hash functions, each with a table of its own, per n-gram order."""
    buckets: int = 3067
    """Rows of each table; a prime spreads best."""
    dim: int = 64
    """Width of all tables together, divisible by their number."""
    layer: int = 1
    """Layer (from 0) on whose input the memory is added."""
    keep: tuple[float, ...] = ()
    """Share of the rows kept per n-gram order, those that the training text uses most; the others are zero, in
    training, artifact and scoring alike. Empty: all."""
    storage: Storage = "float16"
    """How the tables, and that of hashed bigrams, are stored."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        orders, tables = self.orders, self.orders * self.heads
        require_least("model.engram", self, 0, "orders", "layer")
        require(orders <= 3, f"model.engram.orders={orders}: expected 0 to 3 (4-grams)")
        good = 1 <= self.heads <= MOST_HASHES
        require(good, f"model.engram.heads={self.heads}: expected from 1 to {MOST_HASHES}")
        require(
            orders == 0 or (self.dim >= tables and self.dim % tables == 0),
            f"model.engram.dim={self.dim} is not divisible by the {tables} tables of "
            f"model.engram.orders={orders} and model.engram.heads={self.heads}",
        )
        keep, most = self.keep, model.layers - 1
        require(
            len(keep) in (0, orders) and all(0 < share <= 1 for share in keep),
            f"model.engram.keep={keep}: expected a share above 0 and at most 1 for each of {orders} n-gram orders",
        )
        if orders:
            require_hashable("model.engram", self.buckets, model)
            require(self.layer <= most, f"model.engram.layer={self.layer}: expected a layer from 0 to {most}")

    @property
    def multipliers(self) -> list[tuple[int, ...]]:
        """The multipliers of its hashes, [order][head]."""
        return [heads[: self.heads] for heads in MULTIPLIERS[: self.orders]]

    def rows(self, model: Model) -> Rows:
        """Return the parameters."""
        tables = self.orders * self.heads
        return {
            "table": hashed((tables * self.buckets, self.dim // tables), self.storage),
            "value.weight": matrix(model, model.dim, self.dim),
            "key.weight": matrix(model, model.dim, self.dim),
            "sharpness": vector(1, init=0.541),  # the gate's slope starts at 0.1 + 3.9 sigmoid(0.541) = 2.56
            "bias": vector(1),
        }

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return 4 * (model.dim + self.dim)

    def mini(self, model: Model, dim: int) -> "Engram":
        """Return settings of tables of at most 211 rows, 2 wide, in one of the first two layers."""
        width = min(self.dim, 2 * self.orders * self.heads) or self.dim
        return replace(self, buckets=min(self.buckets, 211), dim=width, layer=min(self.layer, 1))


def hashed(shape: tuple[int, int], storage: Storage) -> Param:
    """Return the row of a table of hashed n-grams."""
    return Param(shape, Init("normal", 0.02), "hash", storage)


def require_hashable(where: str, buckets: int, model: Model) -> None:
    """Raise ConfigError unless the vocabulary's n-grams can be hashed into so many buckets."""
    require(2 <= buckets <= MOST_BUCKETS, f"{where}.buckets={buckets}: expected from 2 to {MOST_BUCKETS}")
    good = model.vocab <= MOST_HASHED
    require(good, f"model.vocab={model.vocab}: n-gram memories hash token ids below {MOST_HASHED}")
