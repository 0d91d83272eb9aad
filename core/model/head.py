"""The head: logits by the embedding's own vectors, with an optional bias, softly capped."""

from dataclasses import dataclass

from core.checks import require
from core.model.table import Init, Model, Param, Part, Rows, vector


@dataclass(frozen=True)
class Head(Part):
    """Give every entry of the vocabulary a logit."""

    bias: bool = False
    """Add a learned bias per vocabulary entry to the logits."""
    softcap: float | None = 30.0
    """Logits become softcap * tanh(logits / softcap); None: no cap."""
    untied: bool = False
    """Have vectors of its own beside the embedding's (they start at 0); train.untie_from says from when on."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        good = self.softcap is None or self.softcap > 0
        require(good, f"model.head.softcap={self.softcap}: expected a positive number")

    def rows(self, model: Model) -> Rows:
        """Return the parameters beside the embedding's, which the head shares."""
        shape = model.vocab, model.embedding.dim or model.dim
        own = {"weight": Param(shape, Init("constant", 0.0), "embed", model.embedding.storage)} if self.untied else {}
        gain = {"norm_gain": vector(model.dim)} if model.norm_gains else {}
        return {**own, **gain, **({"bias": vector(model.vocab)} if self.bias else {})}
