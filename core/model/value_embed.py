"""Value embeddings: what attention sums up also holds a vector of the token itself (docs/model.md)."""

from dataclasses import dataclass, replace
from itertools import pairwise

from core.checks import require, require_least
from core.model.attention import attends
from core.model.table import Init, Model, Param, Part, Rows, matrix, vector


@dataclass(frozen=True)
class ValueEmbed(Part):
    """Add a vector of every token to its values in chosen attention layers, from one table that they share."""

    dim: int = 0
    """Width of a table of token vectors that attention adds to its values, projected to their width; 0: none."""
    layers: tuple[int, ...] = ()
    """Attention layers (from 0, rising) that add them, each with a gain of its own."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.value_embed", self, 0, "dim")
        given, most = f"model.value_embed.layers={self.layers}", model.layers - 1
        require(not self.layers or self.dim > 0, f"{given}: set model.value_embed.dim, the width of their table, too")
        where = f"model.value_embed.dim={self.dim}: no layer reads the table; name some in model.value_embed.layers"
        require(self.dim == 0 or len(self.layers) > 0, where)
        require(all(0 <= i <= most for i in self.layers), f"{given}: expected layers from 0 to {most}")
        require(all(a < b for a, b in pairwise(self.layers)), f"{given}: expected rising numbers, each layer once")
        for i in self.layers:
            where = f"{given}: layer {i} is of kind {model.kind(i)}, expected attention layers"
            require(attends(model, i), where)

    def width(self, model: Model) -> int:
        """Return the channels of all key and value heads together."""
        return model.attention.kv_heads * model.attention.width(model)

    def rows(self, model: Model) -> Rows:
        """Return the parameters. None starts at 0: the output projection of attention does."""
        stored = model.embedding.storage, model.deviations.table
        return {
            "table": Param((model.vocab, self.dim), Init("normal", 0.01), "embed", *stored),
            "proj.weight": matrix(model, self.width(model), self.dim),
            "scale": vector(1, init=0.1),
            "gains": vector(len(self.layers), init=1.0),
        }

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return self.dim + 2 * self.width(model)

    def mini(self, model: Model, dim: int) -> "ValueEmbed":
        """Return settings of the same width, measured by the stream's, for as many of the first 4 layers as can be."""
        there = [i for i in range(min(model.layers, 4)) if attends(model, i)][: len(self.layers)]
        return replace(self, dim=max(1, self.dim * dim // model.dim) if there else 0, layers=tuple(there))
