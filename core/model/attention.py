"""Attention: causal, with grouped queries, normalised queries and keys, a gain per head, and partial RoPE."""

from dataclasses import dataclass, replace
from typing import Literal

from core.checks import require, require_least
from core.model.layer import KINDS
from core.model.table import TAPS, Init, Model, Part, Rows, State, matrix, output, vector


@dataclass(frozen=True)
class Attention(Part):
    """Layer kind `attention`: mix positions by causal attention."""

    heads: int = 4
    """Query heads; each has head_width channels."""
    kv_heads: int = 2
    """Key and value heads, each shared by heads / kv_heads query heads."""
    head_width: int | None = None
    """Channels of a head; None: dim / heads."""
    rope_dims: int = 64
    """How many channels of each head are rotated by position (even, at most the width of a head)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    q_gain: float = 1.5
    """Start value of the per-head gain on normalised queries, which model.norm_gains replaces by one per channel."""
    conv: bool = False
    """A short convolution of what enters attention, as the recurrent mixers have one; it starts as the identity."""
    xsa: Literal["none", "projected", "full"] = "none"
    """What a head leaves out of its sum of values (exclusive self-attention): nothing, the part of the sum that points
    along the token's own value, or that value itself."""
    xsa_layers: int | None = None
    """The last so many layers leave it out; None: all."""
    head_gate: Literal["none", "sigmoid", "double"] = "none"
    """A factor per head by some channels of what enters the layer: none, sigmoid (starts at 0.5), double (at 1)."""
    head_gate_width: int = 12
    """How many channels a gate reads; model.dim: all."""
    head_gate_scale: float = 1.0
    """What the gates' products are multiplied by: how fast gates learn, as their weights start at 0."""
    output_gate: bool = False
    """Every channel that a head puts out is multiplied by the sigmoid of a projection of what enters the layer."""

    FLOPS = (
        "attention 2 * seq * heads * head_width (4 * heads * head_width more where it leaves out its own value), "
        "2 * heads * head_gate_width of gates"
    )

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.attention", self, 1, "heads", "kv_heads")
        heads, kv_heads, width, used = self.heads, self.kv_heads, self.width(model), model.mixes("attention")
        divides = self.head_width is not None or model.dim % heads == 0
        require(divides, f"model.dim={model.dim} is not divisible by model.attention.heads={heads}")
        given = f"model.attention.head_width={self.head_width}"
        require(width >= 1, f"{given}: expected at least 1, or none for dim / heads")
        where = f"model.attention.heads={heads} is not divisible by model.attention.kv_heads={kv_heads}"
        require(heads % kv_heads == 0, where)
        good = self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= width
        where = f"model.attention.rope_dims={self.rope_dims}"
        require(good, f"{where}: expected an even number from 0 to {width}, the width of a head")
        require(self.rope_base > 0, f"model.attention.rope_base={self.rope_base}: expected a positive number")
        # A setting without a use would give one model two names in an ablation.
        for name in ("conv", "head_width", "output_gate"):
            value = getattr(self, name)
            require(used or not value, f"model.attention.{name}={value}: no layer has a use for it")
        known, where = self.q_gain == Attention.q_gain, f"model.attention.q_gain={self.q_gain}"
        require(known or not model.norm_gains, f"{where}: model.norm_gains=True has no use for it; leave it out")
        self._check_exclusion(model)
        self._check_gates(model, used)

    def _check_exclusion(self, model: Model) -> None:
        last, where = self.xsa_layers, f"model.attention.xsa_layers={self.xsa_layers}"
        if self.xsa == "none":
            require(last is None, f"{where}: model.attention.xsa=none leaves nothing out; set it, or leave this away")
            return
        good = last is None or 1 <= last <= model.layers
        require(good, f"{where}: expected 1 to {model.layers}, the number of layers, or none for all")
        among = "no layer" if last is None else f"none of the last {last} layers"
        used = any(self.excludes(model, i) for i in range(model.layers))
        require(used, f"model.attention.xsa={self.xsa}: {among} has attention; name such a kind in model.blocks")

    def _check_gates(self, model: Model, used: bool) -> None:
        width, scale = self.head_gate_width, self.head_gate_scale
        if self.head_gate == "none":
            for name, value in (("head_gate_width", width), ("head_gate_scale", scale)):
                where = f"model.attention.{name}={value}"
                known = value == getattr(Attention, name)
                require(known, f"{where}: model.attention.head_gate=none has no use for it; set it, or leave this away")
            return
        require(used, f"model.attention.head_gate={self.head_gate}: no layer has a use for it")
        where = f"model.attention.head_gate_width={width}: expected 1 to {model.dim}, the width of the stream"
        require(1 <= width <= model.dim, where)
        require(scale > 0, f"model.attention.head_gate_scale={scale}: expected a positive number")

    def excludes(self, model: Model, layer: int) -> bool:
        """Return whether a layer leaves its own values out of attention's sum."""
        last = model.layers if self.xsa_layers is None else self.xsa_layers
        return self.xsa != "none" and layer >= model.layers - last and attends(model, layer)

    def width(self, model: Model) -> int:
        """Return the channels of one head."""
        return model.dim // self.heads if self.head_width is None else self.head_width

    def whole(self, model: Model) -> int:
        """Return the channels of all query heads together."""
        return self.heads * self.width(model)

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one layer."""
        kv, whole = self.kv_heads * self.width(model), self.whole(model)
        conv = {"conv": vector(model.dim, TAPS, init=Init("columns", 1.0, 1))} if self.conv else {}
        gate = {"head_gate": vector(self.heads, self.head_gate_width)} if self.head_gate != "none" else {}
        gains = {"q_gain": vector(self.heads, init=self.q_gain)}
        if model.norm_gains:
            gains = {name: vector(self.width(model)) for name in ("q_norm_gain", "k_norm_gain")}
        return conv | {
            "q.weight": matrix(model, whole, model.dim),
            "k.weight": matrix(model, kv, model.dim),
            "v.weight": matrix(model, kv, model.dim),
            **output(model, "o", whole),
            **gains,
            **gate,
            **({"gate.weight": matrix(model, whole, model.dim)} if self.output_gate else {}),
        }

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of scores, sums and gates: a causal token sees half the row."""
        return 2 * seq * self.whole(model) + (2 * self.heads * self.head_gate_width if self.head_gate != "none" else 0)

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        beside = (self.xsa != "none") + (self.head_gate != "none") + 2 * self.output_gate  # what each is a function of
        return (12 + beside) * self.whole(model) + (3 * self.heads * seq if scores else 0)

    def state(self, model: Model) -> State:
        """Return the size of the decoding state: what enters the convolution, and keys and values of every token."""
        return State(self.conv * (TAPS - 1) * model.dim, 2 * self.kv_heads * self.width(model))

    def tape(self, model: Model) -> int:
        """Return the size of what enters the convolution, and of a token's keys and values."""
        return self.conv * model.dim + self.state(model).per_token

    def mini(self, model: Model, dim: int) -> "Attention":
        """Return settings of at most 4 heads with the same sharing, and the same share of rotated channels."""
        heads, there = min(self.heads, 4), [attends(model, i) for i in range(min(model.layers, 4))]
        width = None if self.head_width is None else max(4, self.head_width * dim // model.dim)
        share = (width or dim // heads) * self.rope_dims / self.width(model)
        rotated = max(2, round(share / 2) * 2) if self.rope_dims else 0
        # A model without attention may have no setting that only attention uses.
        small = self if any(there) else Attention(rope_base=self.rope_base, q_gain=self.q_gain)
        if small.xsa_layers is not None:  # so many of the last that one of them has attention
            nearest = 1 + there[::-1].index(True)
            small = replace(small, xsa_layers=min(max(small.xsa_layers, nearest), len(there)))
        if small.head_gate != "none":
            small = replace(small, head_gate_width=min(small.head_gate_width, dim))
        shared = max(1, heads * self.kv_heads // self.heads)
        return replace(small, heads=heads, kv_heads=shared, rope_dims=rotated, head_width=width if any(there) else None)


def attends(model: Model, layer: int) -> bool:
    """Return whether a layer mixes positions by attention."""
    return KINDS[model.kind(layer)].mixer == "attention"


class Exclusion(Part):
    """Count what it costs one layer that it leaves out its own values."""

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of a product with the own value and of taking the projection away."""
        return 4 * model.attention.whole(model)
