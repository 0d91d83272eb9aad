"""Attention: causal, with grouped queries, normalised queries and keys, a gain per head, and partial RoPE."""

from dataclasses import dataclass, replace

from core.checks import require, require_least
from core.model.table import TAPS, Init, Model, Part, Rows, State, matrix, output, vector


@dataclass(frozen=True)
class Attention(Part):
    """Layer kind `attention`: mix positions by causal attention."""

    heads: int = 4
    """Query heads; each has dim / heads channels."""
    kv_heads: int = 2
    """Key and value heads, each shared by heads / kv_heads query heads."""
    rope_dims: int = 64
    """How many channels of each head are rotated by position (even, at most dim / heads)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    q_gain: float = 1.5
    """Start value of the per-head gain on normalised queries."""
    conv: bool = False
    """A short convolution of what enters attention, as the recurrent mixers have one; it starts as the identity."""

    FLOPS = "attention 2 * seq * dim"

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.attention", self, 1, "heads", "kv_heads")
        heads, kv_heads, width = self.heads, self.kv_heads, model.dim // self.heads
        require(model.dim % heads == 0, f"model.dim={model.dim} is not divisible by model.attention.heads={heads}")
        where = f"model.attention.heads={heads} is not divisible by model.attention.kv_heads={kv_heads}"
        require(heads % kv_heads == 0, where)
        good = self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= width
        where = f"model.attention.rope_dims={self.rope_dims}"
        require(good, f"{where}: expected an even number from 0 to dim / heads = {width}")
        require(self.rope_base > 0, f"model.attention.rope_base={self.rope_base}: expected a positive number")
        used = not self.conv or "attention" in model.blocks
        # A setting without a use would give one model two names in an ablation.
        require(used, f"model.attention.conv={self.conv}: no layer has a use for it")

    def width(self, model: Model) -> int:
        """Return the channels of one head."""
        return model.dim // self.heads

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one layer."""
        kv = self.kv_heads * self.width(model)
        conv = {"conv": vector(model.dim, TAPS, init=Init("columns", 1.0, 1))} if self.conv else {}
        return conv | {
            "q.weight": matrix(model, model.dim, model.dim),
            "k.weight": matrix(model, kv, model.dim),
            "v.weight": matrix(model, kv, model.dim),
            **output(model, "o", model.dim),
            "q_gain": vector(self.heads, init=self.q_gain),
        }

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of scores and sums: a causal token sees half the row."""
        return 2 * seq * model.dim

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return 12 * model.dim + (3 * self.heads * seq if scores else 0)

    def state(self, model: Model) -> State:
        """Return the size of the decoding state: what enters the convolution, and keys and values of every token."""
        return State(self.conv * (TAPS - 1) * model.dim, 2 * self.kv_heads * self.width(model))

    def mini(self, model: Model, dim: int) -> "Attention":
        """Return settings of at most 4 heads with the same sharing, and the same share of rotated channels."""
        heads = min(self.heads, 4)
        rotated = max(2, round(dim // heads * self.rope_dims / self.width(model) / 2) * 2) if self.rope_dims else 0
        return replace(self, heads=heads, kv_heads=max(1, heads * self.kv_heads // self.heads), rope_dims=rotated)
