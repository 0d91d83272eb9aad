"""The settings of a twin."""

from dataclasses import dataclass
from typing import Literal

from core.checks import require, require_least, require_limits
from core.model.config import ModelConfig
from core.model.layer import KINDS

MOST_BLOCK = 128
"""Most places of a block: MLX's attention sees so many as one."""
MOST_RANK = 1 << 20
"""Largest rank; the width of a matrix bounds it further."""


@dataclass(frozen=True)
class TwinConfig:
    """A second set of mixer weights of a frozen model, and how it drafts."""

    rank: int = 0
    """Rank of what the twin's large matrices change; 0: every matrix of its mixers is a clone in full."""
    alpha: float = 32.0
    """Low rank: the product of both factors counts alpha / sqrt(rank) times."""
    pissa: bool = True
    """Low rank: factors start as the matrix's largest singular directions, which the frozen rest then lacks (PiSSA);
    False: as a product of 0."""
    full: tuple[str, ...] = ()
    """Low rank: mixers that are cloned in full all the same (attention, koopman, skc, delta)."""
    vectors: bool = True
    """Low rank: gains, biases and rates of the other mixers are the twin's own too; False: the frozen ones."""
    rule: Literal["causal", "end", "first_order"] = "causal"
    """What recurrent mixers read in a block: each place the state up to itself; all the state at the block's end; or
    all that state by first order, as if the block's tokens did not see each other's writes."""
    attention: Literal["open", "causal"] = "open"
    """What attention sees of its own block: every place of it, or those up to itself."""
    exact_anchor: bool = True
    """The last token goes through the frozen mixers: the first draft is always right, and masks follow its state."""
    block: int = 8
    """Places K of a block: the last token and K - 1 masks."""
    learned_mask: bool = True
    """The masks' vector is learned; False: it stays the mean of the embedding's rows."""

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError for settings that have no use in `model`, or that cannot be built."""
        require_limits("twin", self, MOST_RANK, block=MOST_BLOCK)
        require_least("twin", self, 0, "rank")
        require_least("twin", self, 2, "block")
        mixers = sorted({KINDS[model.kind(i)].mixer for i in range(model.layers)})
        for name in ("alpha", "pissa", "full", "vectors"):
            given, unset = getattr(self, name), getattr(TwinConfig, name)
            where = f"twin.{name}={given}: twin.rank=0 clones in full and has no use for it; set a rank"
            require(self.rank > 0 or given == unset, where)
        require(self.alpha > 0, f"twin.alpha={self.alpha}: expected a positive number")
        for name in self.full:
            require(name in mixers, f"twin.full: no layer mixes by {name!r}; this model has {', '.join(mixers)}")
        used, recurrent = {"end": ("koopman", "skc", "delta"), "first_order": ("delta",)}, self.rule != "causal"
        where = f"twin.rule={self.rule}: no layer has a use for it"
        needed = ", ".join(used.get(self.rule, ()))
        require(not recurrent or model.mixes(*used[self.rule]), f"{where}; it needs one of {needed}")
        unset = self.attention == TwinConfig.attention or model.mixes("attention")
        require(unset, f"twin.attention={self.attention}: no layer has attention; leave it out")
