"""Hashed bigrams: a row of a table for every pair of tokens, added to the embedding (docs/model.md)."""

from dataclasses import dataclass

from core.checks import require_least
from core.model.engram import hashed, require_hashable
from core.model.table import Init, Model, Part, Rows, matrix


@dataclass(frozen=True)
class Bigram(Part):
    """Add a row of a hashed table of bigrams to every token's embedding."""

    buckets: int = 0
    """Rows of a table of hashed bigrams that is added to the embedding, ungated; 0: none."""
    dim: int = 32
    """Width of that table."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.bigram", self, 0, "buckets")
        require_least("model.bigram", self, 1, "dim")
        if self.buckets:
            require_hashable("model.bigram", self.buckets, model)

    def rows(self, model: Model) -> Rows:
        """Return the parameters; what is added starts at 0."""
        value = matrix(model, model.dim, self.dim, init=Init("constant", 0.0))
        return {"table": hashed((self.buckets, self.dim), model.engram.storage), "value.weight": value}
