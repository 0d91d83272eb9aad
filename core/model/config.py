"""The model's settings: what both backends build, what an artifact carries."""

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

from core.checks import require, require_limits
from core.model.storage import Storage

KINDS = ("attention", "koopman", "skc", "skc_parallel")
"""Layer kinds that both backends realise (`backends/<name>/blocks`)."""
TAPS = 4
"""Taps of the short convolution, the current token included."""
COUPLING = 4
"""Rank of the couplings between channels and between capsules."""
FLOOR = 0.5
"""Mass that a capsule's mean is taken over beside what was routed to it: one that got nothing keeps almost nothing."""
MOST_WALSH = 8192
"""Largest Walsh-Hadamard matrix."""
MOST_HASHES = 4
"""Hash functions that there are multipliers for, per n-gram order (core/model/engram.py)."""
MOST_BUCKETS = 65_521
"""Most buckets of a hashed table: the largest prime whose hashes stay below 2^32 (core/model/engram.py)."""
MOST_HASHED = 65_536
"""Largest vocabulary whose ids can be hashed so."""
MOST_WIDE = 1 << 20
"""Largest vocabulary, width and number of heads."""
MOST_LAYERS = 1024
"""Most layers."""


class Store(NamedTuple):
    """The shape of a store of capsules: that of a layer, or the bank."""

    heads: int
    capsules: int
    block: int
    shift: bool
    intra: float
    bands: bool
    times: tuple[float, float]


class Pass(NamedTuple):
    """One run through a block, on the way from the embedding to the head."""

    layer: int
    """Which of the model's layers it is, from 0."""
    block: int
    """Whose weights it uses."""
    row: int
    """Which row of the block's residual scales it uses."""
    again: bool
    """Whether it repeats a layer."""


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
    heads: int = 4
    """Query heads; each has dim / heads channels."""
    kv_heads: int = 2
    """Key and value heads, each shared by heads / kv_heads query heads."""
    mlp_hidden: int = 1024
    """Hidden width of the MLP."""
    activation: Literal["relu2", "leaky_relu2"] = "relu2"
    """relu(x)^2, or LeakyReLU(0.5)(x)^2."""
    embed_dim: int | None = None
    """Width of a factored tied embedding, with projections to and from `dim`; None: not factored."""
    vocab_bias: bool = False
    """Add a learned bias per vocabulary entry to the logits."""
    softcap: float | None = 30.0
    """Logits become softcap * tanh(logits / softcap); None: no cap."""
    rope_dims: int = 64
    """How many channels of each head are rotated by position (even, at most dim / heads)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    q_gain: float = 1.5
    """Start value of the per-head gain on normalised queries."""
    attention_conv: bool = False
    """A short convolution of what enters attention, as the recurrent mixers have one; it starts as the identity."""
    residual_mix: bool = False
    """Each layer's input is a learned mix of the stream and the embedding stream (start 1, 0)."""
    unet_skips: bool = False
    """The first half of the layers push their outputs, the second half add them back, scaled (last in, first out)."""
    depth_damping: bool = False
    """Scale the normalised input of layer i (from 0) by 1 / sqrt(i + 1)."""
    norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    documents: Literal["isolated", "packed"] = "isolated"
    """isolated: nothing crosses a BOS token; packed: BOS is an ordinary token (the official behaviour)."""
    bos: int = 1
    """Token id that starts a document."""
    matrix_init: Literal["normal", "uniform"] = "normal"
    """Start of matrices: N(0, matrix_std^2), or U(-1/sqrt(in), 1/sqrt(in)). Output projections always start at 0."""
    matrix_std: float = 0.02
    """Standard deviation of matrices that start normal."""
    embed_std: float = 0.02
    """Standard deviation of the embedding's start values."""
    matrix_storage: Storage = "float16"
    """How the layers' matrices are stored: class and, behind the slash, how many weights share a scale."""
    table_storage: Storage = "float16"
    """How the embedding and its projections are stored."""
    output_norm: Literal["none", "plain", "gain"] = "none"
    """RMS norm of what enters an output projection (mixer and MLP): none, without or with a learned gain."""
    mixer_dim: int = 256
    """Channels C of a Koopman mixer, a power of two (kinds koopman, skc, skc_parallel)."""
    mixer_times: tuple[float, float] = (0.7, 8.0)
    """Start values of a mixer's time constants, in tokens: the shortest and the longest, spread over its channels."""
    capsules: int = 16
    """Capsules N per head of an SKC layer."""
    capsule_heads: int = 1
    """Capsule heads; each stores mixer_dim / capsule_heads channels."""
    capsule_block: int = 16
    """Tokens per block, a power of two: a capsule is read from the block after the one that wrote it."""
    capsule_times: tuple[float, float] = (1.5, 32.0)
    """Start values of the capsules' time constants, in blocks: the shortest and the longest."""
    capsule_gain: float = 0.1
    """Start value of the gain per channel on what is read from capsules."""
    capsule_shift: bool = True
    """A token is stored under the key of the token before it: an associative memory of what followed."""
    capsule_intra: float = 0.0
    """Weight of what earlier tokens of the open block add to a read; 0: completed blocks only."""
    capsule_bands: bool = True
    """Learn each capsule's weighting of time inside a block, as Walsh coefficients; False: plain sums."""
    bank: Literal["none", "head", "middle", "both"] = "none"
    """Associative store of token vectors, keyed by the token before: read in front of the head, between the two halves
    of the layers, or at both places."""
    bank_heads: int = 4
    """Capsule heads of the bank; each stores dim / bank_heads channels."""
    bank_capsules: int = 16
    """Capsules per head of the bank; its blocks have capsule_block tokens."""
    bank_times: tuple[float, float] = (1.5, 64.0)
    """Start values of the bank's time constants, in blocks: the shortest and the longest."""
    bank_gate: float = 0.2
    """Start value of the gain per channel on what is read from the bank."""
    engram_orders: int = 0
    """EngramHash, a hashed n-gram memory: 0 none, 1 bigrams, 2 also trigrams, 3 also 4-grams."""
    engram_heads: int = 4
    """Hash functions, each with a table of its own, per n-gram order."""
    engram_buckets: int = 3067
    """Rows of each table; a prime spreads best."""
    engram_dim: int = 64
    """Width of all tables together, divisible by their number."""
    engram_layer: int = 1
    """Layer (from 0) on whose input the memory is added."""
    engram_keep: tuple[float, ...] = ()
    """Share of the rows kept per n-gram order, those that the training text uses most; the others are zero, in
    training, artifact and scoring alike. Empty: all."""
    hash_storage: Storage = "float16"
    """How the tables of EngramHash and of hashed bigrams are stored."""
    bigram_buckets: int = 0
    """Rows of a table of hashed bigrams that is added to the embedding, ungated; 0: none."""
    bigram_dim: int = 32
    """Width of that table."""
    smear: bool = False
    """Mix a learned share of the token before into every token's embedding, per channel (starts near 0)."""
    shared_blocks: int | None = None
    """Distinct blocks: layer i has the weights of block i mod shared_blocks, and residual scales of its own.
    None: every layer has its own weights."""
    repeat_layers: tuple[int, ...] = ()
    """Consecutive layers (from 0) that run a second time after the last of them, with residual scales of their own that
    start at 0; train.repeat_from says from when on."""

    def __post_init__(self) -> None:
        many = MOST_LAYERS
        require_limits("model", self, MOST_WIDE, layers=many, shared_blocks=many, engram_layer=many, repeat_layers=many)
        for name in ("vocab", "dim", "layers", "heads", "kv_heads", "mlp_hidden"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: expected at least 1")
        require(self.embed_dim is None or self.embed_dim >= 1, f"model.embed_dim={self.embed_dim}: expected at least 1")
        require(self.dim % self.heads == 0, f"model.dim={self.dim} is not divisible by model.heads={self.heads}")
        require(
            self.heads % self.kv_heads == 0,
            f"model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}",
        )
        require(len(self.blocks) >= 1, "model.blocks is empty: name at least one layer kind")
        for kind in self.blocks:
            require(kind in KINDS, f"model.blocks: unknown layer kind {kind!r}; known kinds: {', '.join(KINDS)}")
        require(
            self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= self.head_dim,
            f"model.rope_dims={self.rope_dims}: expected an even number from 0 to dim / heads = {self.head_dim}",
        )
        require(0 <= self.bos < self.vocab, f"model.bos={self.bos}: expected a token id below model.vocab={self.vocab}")
        require(self.softcap is None or self.softcap > 0, f"model.softcap={self.softcap}: expected a positive number")
        for name in ("norm_eps", "rope_base"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)}: expected a positive number")
        for name in ("matrix_std", "embed_std", "capsule_intra", "engram_orders", "bigram_buckets", "engram_layer"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)}: expected a number from 0 up")
        self._check_idle()
        self._check_mixers()
        self._check_memories()
        self._check_trunk()

    def _check_mixers(self) -> None:
        for name in ("mixer_dim", "capsule_block"):
            value = getattr(self, name)
            power = 2 <= value <= MOST_WALSH and value & (value - 1) == 0
            require(power, f"model.{name}={value}: expected a power of two from 2 to {MOST_WALSH} (Walsh-Hadamard)")
        for name in ("capsules", "capsule_heads", "bank_capsules", "bank_heads"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: expected at least 1")
        require(
            self.mixer_dim % self.capsule_heads == 0,
            f"model.mixer_dim={self.mixer_dim} is not divisible by model.capsule_heads={self.capsule_heads}",
        )
        for name in ("mixer_times", "capsule_times", "bank_times"):
            times = getattr(self, name)
            good = len(times) == 2 and 0.01 <= times[0] <= times[1] <= 1e6
            require(good, f"model.{name}={times}: expected two rising numbers from 0.01 to 1e6")

    def _check_idle(self) -> None:
        """Refuse what no layer would use: the user meant something else."""
        stores = {"skc", "skc_parallel"} & set(self.blocks)
        for name, used in (
            ("attention_conv", "attention" in self.blocks),
            ("capsule_intra", bool(stores)),
        ):
            require(not getattr(self, name) or used, f"model.{name}={getattr(self, name)}: no layer has a use for it")
        require(self.capsule_shift or bool(stores), "model.capsule_shift=False: no layer has capsules")

    def _check_memories(self) -> None:
        require(
            self.bank == "none" or self.dim % self.bank_heads == 0,
            f"model.dim={self.dim} is not divisible by model.bank_heads={self.bank_heads}",
        )
        require(
            self.bank not in ("middle", "both") or self.layers >= 2,
            f"model.bank={self.bank} stands between two halves of the layers, but model.layers={self.layers}",
        )
        orders, tables = self.engram_orders, self.engram_orders * self.engram_heads
        require(orders <= 3, f"model.engram_orders={orders}: expected 0 to 3 (4-grams)")
        most = MOST_HASHES
        require(1 <= self.engram_heads <= most, f"model.engram_heads={self.engram_heads}: expected from 1 to {most}")
        require(
            orders == 0 or (self.engram_dim >= tables and self.engram_dim % tables == 0),
            f"model.engram_dim={self.engram_dim} is not divisible by the {tables} tables of "
            f"model.engram_orders={orders} and model.engram_heads={self.engram_heads}",
        )
        for name, used in (("engram_buckets", orders), ("bigram_buckets", self.bigram_buckets)):
            value = getattr(self, name)
            require(not used or 2 <= value <= MOST_BUCKETS, f"model.{name}={value}: expected from 2 to {MOST_BUCKETS}")
        require(
            not self.reach or self.vocab <= MOST_HASHED,
            f"model.vocab={self.vocab}: n-gram memories hash token ids below {MOST_HASHED}",
        )
        require(self.bigram_dim >= 1, f"model.bigram_dim={self.bigram_dim}: expected at least 1")
        require(
            orders == 0 or self.engram_layer < self.layers,
            f"model.engram_layer={self.engram_layer}: expected a layer from 0 to {self.layers - 1}",
        )
        keep = self.engram_keep
        require(
            len(keep) in (0, orders) and all(0 < share <= 1 for share in keep),
            f"model.engram_keep={keep}: expected a share above 0 and at most 1 for each of {orders} n-gram orders",
        )

    def _check_trunk(self) -> None:  # of a hostile file too: nothing here may take time or memory by its numbers
        shared, again, period = self.shared_blocks, self.repeat_layers, len(self.blocks)
        require(shared is None or 1 <= shared <= self.layers, f"model.shared_blocks={shared}: expected 1 to layers")
        alike = len(set(self.blocks)) == 1
        require(
            shared in (None, self.layers) or alike or shared % period == 0,
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

    @property
    def layer_store(self) -> Store:
        """The capsules of an SKC layer."""
        shape = (self.capsule_heads, self.capsules, self.capsule_block, self.capsule_shift, self.capsule_intra)
        return Store(*shape, self.capsule_bands, self.capsule_times)

    @property
    def bank_store(self) -> Store:
        """The capsules of the bank: shifted keys, and the open block is read too."""
        shape = (self.bank_heads, self.bank_capsules, self.capsule_block, True, 1.0)
        return Store(*shape, self.capsule_bands, self.bank_times)

    @property
    def reach(self) -> int:
        """Tokens before the current one that n-gram memories look at."""
        return max(self.engram_orders, 1 if self.bigram_buckets else 0)

    @property
    def banks(self) -> tuple[str, ...]:
        """The places of the bank."""
        return {"none": (), "head": ("head",), "middle": ("middle",), "both": ("middle", "head")}[self.bank]

    @property
    def skips(self) -> int:
        """Layers whose output a later one adds again, each with a scale per channel; of one layer, none."""
        return self.layers // 2 if self.unet_skips else 0

    def block_of(self, layer: int) -> int:
        """Return the block whose weights a layer uses."""
        return layer if self.shared_blocks is None else layer % self.shared_blocks

    def passes(self, repeat: bool) -> tuple["Pass", ...]:
        """Return what runs, in order; without `repeat` as long as train.repeat_from has not been reached.

        A block's residual scales have one row per pass: those of layers first, then those of repeats.
        """
        rows: dict[int, int] = {}
        layers, again = [], []
        for out, among in ((layers, range(self.layers)), (again, self.repeat_layers)):
            for i in among:
                block = self.block_of(i)
                row = rows.get(block, 0)
                out.append(Pass(i, block, row, out is again))
                rows[block] = row + 1
        if not repeat or not again:
            return tuple(layers)
        after = self.repeat_layers[-1] + 1
        return (*layers[:after], *again, *layers[after:])

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads

    def kind(self, layer: int) -> str:
        """Return the kind of a layer."""
        return self.blocks[layer % len(self.blocks)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: `blocks` repeated to `layers` entries."""
        return tuple(map(self.kind, range(self.layers)))
