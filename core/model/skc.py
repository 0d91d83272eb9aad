"""SKC layers: a Koopman mixer whose values are also stored in capsules and read from them (docs/model.md)."""

from dataclasses import dataclass, replace

from core.checks import require, require_least
from core.model.capsules import Store
from core.model.koopman import require_power
from core.model.table import Model, Part, Rows, State, below, matrix, require_times, vector


@dataclass(frozen=True)
class SKC(Part):
    """Layer kinds `skc` and `skc_parallel`: mix positions by a recurrence (model.koopman) and by capsules."""

    capsules: int = 16
    """Capsules N per head."""
    heads: int = 1
    """Capsule heads; each stores koopman.dim / heads channels."""
    block: int = 16
    """Tokens per block, a power of two: a capsule is read from the block after the one that wrote it."""
    times: tuple[float, float] = (1.5, 32.0)
    """Start values of the capsules' time constants, in blocks: the shortest and the longest."""
    gain: float = 0.1
    """Start value of the gain per channel on what is read from capsules."""
    shift: bool = True
    """A token is stored under the key of the token before it: an associative memory of what followed."""
    intra: float = 0.0
    """Weight of what earlier tokens of the open block add to a read; 0: completed blocks only."""
    bands: bool = True
    """Learn each capsule's weighting of time inside a block, as Walsh coefficients; False: plain sums."""
    ahead: bool = False
    """A read also shows what a learned linear step, in the Walsh basis of a head's channels, makes of each capsule."""

    FLOPS = Store.FLOPS

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_power("model.skc.block", self.block)
        require_least("model.skc", self, 1, "capsules", "heads")
        require_least("model.skc", self, 0, "intra")
        where = f"model.koopman.dim={model.koopman.dim} is not divisible by model.skc.heads={self.heads}"
        require(model.koopman.dim % self.heads == 0, where)
        require_times("model.skc.times", self.times)
        used = bool({"skc", "skc_parallel"} & set(model.blocks))
        # A setting without a use would give one model two names in an ablation.
        require(used or not self.intra, f"model.skc.intra={self.intra}: no layer has a use for it")
        require(used or self.shift, f"model.skc.shift={self.shift}: no layer has capsules")
        require(used or not self.ahead, f"model.skc.ahead={self.ahead}: no layer has capsules")

    def store(self, model: Model) -> Store:
        """Return the capsules of one layer."""
        options = (self.shift, self.intra, self.bands, self.ahead, self.times)
        return Store(model.koopman.dim, self.heads, self.capsules, self.block, *options)

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one layer."""
        routes = self.heads * self.capsules
        return {
            **model.koopman.rows(model),
            "write.weight": matrix(model, routes, model.dim),
            "write_bias": vector(routes),
            "read.weight": matrix(model, routes, model.dim),
            **below("capsules", self.store(model).rows()),
            "capsule_gain": vector(model.koopman.dim, init=self.gain),
        }

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of the recurrence and of the capsules."""
        return model.koopman.flops(model, seq) + self.store(model).flops()

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return model.koopman.values(model, seq, scores)

    def state(self, model: Model) -> State:
        """Return the size of the decoding state: the recurrence's and the capsules'."""
        return State(model.koopman.state(model).fixed + self.store(model).state().fixed)

    def tape(self, model: Model) -> int:
        """Return the size of what the recurrence and the capsules keep of every token."""
        return model.koopman.tape(model) + self.store(model).tape()

    def mini(self, model: Model, dim: int) -> "SKC":
        """Return settings of at most 8 capsules in 4 heads, in blocks of at most 8 tokens."""
        small = {"capsules": min(self.capsules, 8), "heads": min(self.heads, 4), "block": min(self.block, 8)}
        return replace(self, **small)
