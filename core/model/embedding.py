"""The embedding: a vector per token, which the tied head reads too; it may be factored."""

from dataclasses import dataclass, replace

from core.checks import require, require_least
from core.model.storage import Storage
from core.model.table import Init, Model, Param, Part, Rows, matrix


@dataclass(frozen=True)
class Embedding(Part):
    """Give every token a vector."""

    dim: int | None = None
    """Width of a factored tied embedding, with projections to and from the stream's width; None: not factored."""
    std: float = 0.02
    """Standard deviation of the start values."""
    storage: Storage = "float16"
    """How the embedding, its projections and the table of value embeddings are stored."""
    norm: bool = True
    """The stream starts as the RMS norm of the vectors; False: as the vectors themselves."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require(self.dim is None or self.dim >= 1, f"model.embedding.dim={self.dim}: expected at least 1")
        require_least("model.embedding", self, 0, "std")
        where = f"model.embedding.norm=False: model.bigram.buckets={model.bigram.buckets}: bigrams stand in front of"
        require(self.norm or not model.bigram.buckets, f"{where} that norm; leave one of the two out")

    def rows(self, model: Model) -> Rows:
        """Return the parameters, by their whole names."""
        width, stored = self.dim or model.dim, {"storage": self.storage, "deviation": model.deviations.table}
        rows = {"embed.weight": Param((model.vocab, width), Init("normal", self.std), "embed", **stored)}
        if self.dim is not None:
            rows["embed_up.weight"] = matrix(model, model.dim, width, **stored)
            rows["embed_down.weight"] = matrix(model, width, model.dim, **stored)
        return rows

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of the head's product with the same table: looking up takes none."""
        return 2 * model.vocab * (self.dim or model.dim)

    def mini(self, model: Model, dim: int) -> "Embedding":
        """Return settings of the same width, measured by the stream's."""
        return replace(self, dim=None if self.dim is None else max(1, self.dim * dim // model.dim))
