"""Hashed bigrams: a row of a table for every pair of tokens, added to the embedding (docs/model.md)."""

from dataclasses import dataclass, replace
from typing import Literal

from core.checks import require, require_least
from core.model.engram import hashed, require_hashable
from core.model.table import Init, Model, Part, Rows, matrix, vector


@dataclass(frozen=True)
class Bigram(Part):
    """Add a row of a hashed table of bigrams to every token's embedding."""

    buckets: int = 0
    """Rows of a table of hashed bigrams that is added to the embedding, ungated; 0: none."""
    dim: int = 32
    """Width of that table."""
    hash: Literal["multiply", "xor"] = "multiply"
    """The row of a pair. multiply: a polynomial of the ids, and no row at the first token of a document. xor: the
    exclusive or of their multiples, and the last row at the first token."""
    scale: float | None = None
    """Start value of a learned factor of what is added; None: there is no factor."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.bigram", self, 0, "buckets")
        require_least("model.bigram", self, 1, "dim")
        scale, used = f"model.bigram.scale={self.scale}", "there is no table; set model.bigram.buckets, too"
        require(self.buckets > 0 or self.hash == "multiply", f"model.bigram.hash={self.hash}: {used}")
        require(self.buckets > 0 or self.scale is None, f"{scale}: {used}")
        # The projection starts at 0: beside another factor of 0 neither would ever have a gradient.
        require(self.scale is None or self.scale > 0, f"{scale}: expected a number above 0")
        if self.buckets:
            require_hashable("model.bigram", self.buckets, model)

    def rows(self, model: Model) -> Rows:
        """Return the parameters; what is added starts at 0."""
        value = matrix(model, model.dim, self.dim, init=Init("constant", 0.0))
        rows = {"table": hashed((self.buckets, self.dim), model.engram.storage), "value.weight": value}
        return rows if self.scale is None else rows | {"scale": vector(1, init=self.scale)}

    def mini(self, model: Model, dim: int) -> "Bigram":
        """Return settings of the same width, measured by the stream's, and of few rows."""
        return replace(self, buckets=min(self.buckets, 101), dim=max(1, self.dim * dim // model.dim))
