"""The model's settings: what both backends build, what an artifact carries. Those of a part are in the part's file."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Literal

from core.checks import require, require_least, require_limits
from core.model import trunk
from core.model.attention import Attention
from core.model.bank import Bank
from core.model.bigram import Bigram
from core.model.delta import Delta
from core.model.deviations import Deviations
from core.model.embedding import Embedding
from core.model.engram import Engram
from core.model.experts import Experts
from core.model.feedback import Feedback
from core.model.head import Head
from core.model.koopman import Koopman
from core.model.lanes import Lanes
from core.model.layer import KINDS, Layer
from core.model.mlp import MLP
from core.model.skc import SKC
from core.model.skips import Skips
from core.model.smear import Smear
from core.model.storage import Storage
from core.model.table import Part
from core.model.value_embed import ValueEmbed

MOST_WIDE = 1 << 20
"""Largest vocabulary, width and number of heads."""
MOST_LAYERS = 1024
"""Most layers."""
MOST_REPEATS = 16
"""Most times that a layer is repeated."""


@dataclass(frozen=True)
class ModelConfig:
    """The model: what both backends build and what an artifact carries."""

    vocab: int = 1024
    """Vocabulary size V."""
    dim: int = 256
    """Width D of the residual stream."""
    layers: int = 4
    """Number of layers."""
    blocks: tuple[str, ...] = ("attention",)
    """Layer kinds, repeated in this order until there are `layers` of them."""
    residual_scales: bool = True
    """Each layer adds its mixer and its MLP through a learned scale per channel (start 1); False: as they are."""
    residual_mix: bool = False
    """Each layer's input is a learned mix of the stream and the embedding stream (start 1, 0)."""
    depth_damping: bool = False
    """Scale the normalised input of layer i (from 0) by 1 / sqrt(i + 1)."""
    output_norm: Literal["none", "plain", "gain"] = "none"
    """RMS norm of what enters an output projection (mixer and MLP): none, without or with a learned gain."""
    norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    norm_gains: bool = False
    """Norms of what enters a mixer, an MLP and the head, and of queries and keys, have gains 1 + w (w starts at 0)."""
    documents: Literal["isolated", "packed"] = "isolated"
    """isolated: nothing crosses a BOS token; packed: BOS is an ordinary token (the official behaviour)."""
    bos: int = 1
    """Token id that starts a document."""
    matrix_init: Literal["normal", "uniform", "orthogonal"] = "normal"
    """Start of matrices: N(0, matrix_std^2), U(-1/sqrt(in), 1/sqrt(in)), or rows (columns, if there are fewer) at right
    angles and of length 1. Output projections always start at 0."""
    matrix_std: float = 0.02
    """Standard deviation of matrices that start normal."""
    matrix_storage: Storage = "float16"
    """How the layers' matrices are stored: class and, behind the slash, how many weights share a scale."""
    shared_blocks: int | None = None
    """Distinct blocks, which layers share in the order of share_order; each has residual scales of its own.
    None: every layer has its own weights."""
    share_order: Literal["cycle", "mirror"] = "cycle"
    """cycle: layer i has the weights of block i mod shared_blocks; mirror: of block min(i, layers - 1 - i)."""
    repeat_layers: tuple[int, ...] = ()
    """Consecutive layers (from 0) that run again after the last of them; train.repeat_from says from when on."""
    repeat_times: int = 1
    """How often they run again."""
    repeat_scales: Literal["own", "shared"] = "own"
    """Residual scales and mixes of a repeat: its own, which start at 0, or those of the layer that it repeats."""
    repeat_order: Literal["after", "at_once"] = "after"
    """after: they run again as a block, after the last of them; at_once: each runs again before the next layer."""
    repeat_blend: bool = False
    """A repeat puts out g times what it computes and 1 - g times what it was given, g learned (starts at 1/2)."""

    deviations: Deviations = field(default_factory=Deviations)
    embedding: Embedding = field(default_factory=Embedding)
    smear: Smear = field(default_factory=Smear)
    bigram: Bigram = field(default_factory=Bigram)
    engram: Engram = field(default_factory=Engram)
    value_embed: ValueEmbed = field(default_factory=ValueEmbed)
    attention: Attention = field(default_factory=Attention)
    koopman: Koopman = field(default_factory=Koopman)
    skc: SKC = field(default_factory=SKC)
    delta: Delta = field(default_factory=Delta)
    mlp: MLP = field(default_factory=MLP)
    experts: Experts = field(default_factory=Experts)
    bank: Bank = field(default_factory=Bank)
    skips: Skips = field(default_factory=Skips)
    lanes: Lanes = field(default_factory=Lanes)
    feedback: Feedback = field(default_factory=Feedback)
    head: Head = field(default_factory=Head)

    def __post_init__(self) -> None:
        many = dict.fromkeys(("layers", "shared_blocks", "repeat_layers", "layer", "start"), MOST_LAYERS)
        require_limits("model", self, MOST_WIDE, **many, repeat_times=MOST_REPEATS)
        require_least("model", self, 1, "vocab", "dim", "layers", "repeat_times")
        require_least("model", self, 0, "matrix_std")
        require(len(self.blocks) >= 1, "model.blocks is empty: name at least one layer kind")
        for kind in self.blocks:
            require(kind in KINDS, f"model.blocks: unknown layer kind {kind!r}; known kinds: {', '.join(KINDS)}")
        require(0 <= self.bos < self.vocab, f"model.bos={self.bos}: expected a token id below model.vocab={self.vocab}")
        require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps}: expected a positive number")
        used, given = self.matrix_init != "orthogonal" or self.matrix_std == ModelConfig.matrix_std, self.matrix_std
        require(used, f"model.matrix_std={given}: orthogonal matrices have no use for it; leave it out")
        self.deviations.check(self)
        for part in self.parts.values():
            part.check(self)
        self._check_trunk()
        own, without = bool(self.repeat_layers) and self.repeat_scales == "own", "model.residual_scales=False"
        require(self.residual_scales or not own, f"{without}: repeats begin at scales of 0; set it")
        require(self.residual_scales or not self.experts.count, f"{without}: experts begin at small scales; set it")

    def _check_trunk(self) -> None:  # of a hostile file too: nothing here may take time or memory by its numbers
        shared, again, period = self.shared_blocks, self.repeat_layers, len(self.blocks)
        require(shared is None or 1 <= shared <= self.layers, f"model.shared_blocks={shared}: expected 1 to layers")
        alike, mirrored = len(set(self.blocks)) == 1, self.share_order == "mirror"
        half = (self.layers + 1) // 2
        where = f"model.share_order=mirror: expected model.shared_blocks={half} for {self.layers} layers, not {shared}"
        require(not mirrored or shared == half, where)
        for i in range(half * mirrored):
            here, there = self.kind(i), self.kind(self.layers - 1 - i)
            where = f"model.share_order=mirror: layers {i} and {self.layers - 1 - i} are of kinds {here} and {there}"
            require(here == there, f"{where}: they share a block; expected kinds that read alike from both ends")
        require(
            mirrored or shared in (None, self.layers) or alike or shared % period == 0,
            f"model.shared_blocks={shared}: layers of different kinds would share a block; "
            f"make it a multiple of the {period} kinds of model.blocks",
        )
        require(
            all(b == a + 1 for a, b in itertools.pairwise(again)),
            f"model.repeat_layers={again}: expected consecutive layers, for example (3, 4)",
        )
        require(
            all(0 <= i < self.layers for i in again),
            f"model.repeat_layers={again}: expected layers from 0 to {self.layers - 1}",
        )
        for name in ("repeat_times", "repeat_scales", "repeat_order", "repeat_blend"):
            given, unset = getattr(self, name), getattr(ModelConfig, name)
            where = f"model.{name}={given}: name layers to repeat in model.repeat_layers, or leave it out"
            require(bool(again) or given == unset, where)

    @property
    def parts(self) -> dict[str, Part]:
        """The settings of every part, by the part's name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Part)}

    def part(self, stage: trunk.Stage) -> Part:
        """Return the part that a stage is a use of."""
        return Layer(stage.block) if stage.part == "layer" else getattr(self, stage.part)

    def stages(self, repeat: bool) -> tuple[trunk.Stage, ...]:
        """Return all that happens between embedding and head, in order; `repeat`: layers that are to be repeated are.

        Without it as long as train.repeat_from has not been reached.
        """
        return trunk.stages(self, repeat)

    def kind(self, layer: int) -> str:
        """Return the kind of a layer."""
        return self.blocks[layer % len(self.blocks)]

    def mixes(self, *mixers: str) -> bool:
        """Return whether some layer mixes positions by one of these parts."""
        return any(KINDS[kind].mixer in mixers for kind in self.blocks[: self.layers])

    @property
    def stores(self) -> bool:
        """Whether some part keeps values in capsules."""
        return self.mixes("skc") or bool(self.bank.places)

    def block_of(self, layer: int) -> int:
        """Return the block whose weights a layer uses."""
        if self.share_order == "mirror":
            return min(layer, self.layers - 1 - layer)
        return layer if self.shared_blocks is None else layer % self.shared_blocks

    def uses_of(self, block: int) -> tuple[int, int]:
        """Return how many layers use a block, and how many repeats."""
        first = len(range(block, self.layers, self.shared_blocks or self.layers))
        first = len({block, self.layers - 1 - block}) if self.share_order == "mirror" else first
        return first, self.repeat_times * sum(self.block_of(i) == block for i in self.repeat_layers)

    @property
    def reach(self) -> int:
        """Tokens before the current one that n-gram memories look at."""
        return max(self.engram.orders, 1 if self.bigram.buckets else 0)
