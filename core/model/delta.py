"""Layer kind `delta`: the gated delta rule, as in Qwen3-Next and Qwen3.5: each head keeps a matrix, reads it by a key,
writes what the read lacked, and is read by a query (docs/model.md)."""

from dataclasses import dataclass, replace

from core.checks import require, require_least
from core.model.table import TAPS, Init, Model, Part, Rows, State, matrix, output, require_times, vector

UNIT = 1e-6
"""What the squared length of a query or key is at least, so that the norm of nothing has a gradient."""


@dataclass(frozen=True)
class Delta(Part):
    """Layer kind `delta`: mix positions by the gated delta rule."""

    heads: int = 4
    """Heads H, each with a state (key_dim, value_dim), a decay and a rate of writing."""
    key_heads: int = 4
    """Heads of queries and keys; each serves heads / key_heads heads."""
    key_dim: int = 64
    """Channels of a query and of a key."""
    value_dim: int = 64
    """Channels of a value."""
    times: tuple[float, float] = (4.0, 256.0)
    """Start values of the heads' time constants, in tokens: the shortest and the longest, spread over the heads."""
    conv: bool = True
    """A short convolution, then silu, over queries, keys and values; False: silu alone."""
    gate: bool = True
    """What is read is multiplied by silu of a projection of the layer's input."""

    FLOPS = "delta rule 6 * heads * key_dim * value_dim (a read, a write and a query of its states)"

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.delta", self, 1, "heads", "key_heads", "key_dim", "value_dim")
        where = f"model.delta.heads={self.heads} is not divisible by model.delta.key_heads={self.key_heads}"
        require(self.heads % self.key_heads == 0, where)
        require_times("model.delta.times", self.times)
        for name in ("conv", "gate"):
            where = f"model.delta.{name}=False: no layer has a use for it; name delta in model.blocks, or leave it out"
            require(getattr(self, name) or model.mixes("delta"), where)

    @property
    def keys(self) -> int:
        """Channels of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values_wide(self) -> int:
        """Channels of all values."""
        return self.heads * self.value_dim

    @property
    def entering(self) -> int:
        """Channels of queries, keys and values together."""
        return 2 * self.keys + self.values_wide

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one layer."""
        gate = {"gate.weight": matrix(model, self.values_wide, model.dim)} if self.gate else {}
        conv = {"conv": vector(self.entering, TAPS, init=Init("uniform", TAPS**-0.5))} if self.conv else {}
        return {
            "q.weight": matrix(model, self.keys, model.dim),
            "k.weight": matrix(model, self.keys, model.dim),
            "v.weight": matrix(model, self.values_wide, model.dim),
            **gate,
            "beta.weight": matrix(model, self.heads, model.dim),
            "decay.weight": matrix(model, self.heads, model.dim),
            "decay_bias": vector(self.heads, init=Init("rates", *self.times)),
            "decay_rate": vector(self.heads),
            **conv,
            "read_gain": vector(self.value_dim, init=1.0),
            **output(model, "o", self.values_wide),
        }

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of a read, a write and a query of every state; a chunk's products take more."""
        return 6 * self.heads * self.key_dim * self.value_dim

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        chunk = self.heads * (6 * CHUNK + self.key_dim * (4 + (self.key_dim + 2 * self.value_dim) / CHUNK))
        return 4 * model.dim + 8 * self.entering + round(chunk)

    def state(self, model: Model) -> State:
        """Return the size of the decoding state: what enters the convolution, and every head's matrix."""
        return State(self.conv * (TAPS - 1) * self.entering + self.heads * self.key_dim * self.value_dim)

    def tape(self, model: Model) -> int:
        """Return the size of a token's key, of what it writes, of its decay and of what enters the convolution."""
        return self.keys + self.values_wide + self.heads + self.conv * self.entering

    def mini(self, model: Model, dim: int) -> "Delta":
        """Return settings of at most 4 heads with the same sharing, of at most 8 and 12 channels."""
        heads = min(self.heads, 4)
        shared = max(1, heads * self.key_heads // self.heads)
        key_dim, value_dim = min(self.key_dim, 8), min(self.value_dim, 12)
        return replace(self, heads=heads, key_heads=shared, key_dim=key_dim, value_dim=value_dim)


CHUNK = 32
"""Positions of a chunk, whose tokens are computed together: twice as many take twice the products, half as many twice
the steps from chunk to chunk."""
