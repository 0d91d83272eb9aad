"""Every setting of a run, as frozen dataclasses: the docstring under a field is its help text.

`RunConfig` is what `config.json` holds; `to_json` and `from_json` are exact inverses and refuse unknown keys.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from core.storage import Storage

SCHEMA = 2
KINDS = ("attention", "koopman", "skc", "skc_parallel")
"""Layer kinds that both backends realise (`backends/<name>/blocks`)."""
TAPS = 4
"""Taps of the short convolution, the current token included."""
COUPLING = 4
"""Rank of the couplings between channels and between capsules."""
LATER = {
    "mixer_dim", "mixer_times", "capsules", "capsule_heads", "capsule_block", "capsule_times", "capsule_gain",
    "capsule_shift", "capsule_intra", "capsule_bands", "shared_blocks", "repeat_layers", "repeat_from",
}  # fmt: skip
"""Fields that came after the first files were written: a file without one of them means its default."""


class ConfigError(ValueError):
    """The user's setting cannot be honoured: the message names the field, the value and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_finite(section: str, config: Any) -> None:
    """Raise ConfigError for a field of `config` that is a number but not a finite one."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        numbers = value if isinstance(value, tuple) else (value,)
        finite = all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
        require(finite, f"{section}.{f.name}={value}: expected a finite number")


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
    shared_blocks: int | None = None
    """Distinct blocks: layer i has the weights of block i mod shared_blocks, and residual scales of its own.
    None: every layer has its own weights."""
    repeat_layers: tuple[int, ...] = ()
    """Consecutive layers (from 0) that run a second time after the last of them, with residual scales of their own that
    start at 0; train.repeat_from says from when on."""

    def __post_init__(self) -> None:
        require_finite("model", self)
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
        for name in ("matrix_std", "embed_std", "capsule_intra"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)}: expected a number from 0 up")
        self._check_mixers()
        self._check_trunk()

    def _check_mixers(self) -> None:
        for name in ("mixer_dim", "capsule_block"):
            value = getattr(self, name)
            power = value >= 2 and value & (value - 1) == 0
            require(power, f"model.{name}={value}: expected a power of two from 2 up (Walsh-Hadamard transform)")
        for name in ("capsules", "capsule_heads"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: expected at least 1")
        require(
            self.mixer_dim % self.capsule_heads == 0,
            f"model.mixer_dim={self.mixer_dim} is not divisible by model.capsule_heads={self.capsule_heads}",
        )
        for name in ("mixer_times", "capsule_times"):
            times = getattr(self, name)
            good = len(times) == 2 and 0.01 <= times[0] <= times[1] <= 1e6
            require(good, f"model.{name}={times}: expected two rising numbers from 0.01 to 1e6")

    def _check_trunk(self) -> None:
        shared, again = self.shared_blocks, self.repeat_layers
        require(shared is None or 1 <= shared <= self.layers, f"model.shared_blocks={shared}: expected 1 to layers")
        for i, kind in enumerate(self.kinds):
            first = self.kinds[self.block_of(i)]
            require(
                kind == first,
                f"model.shared_blocks={shared}: layer {i} ({kind}) would share a block with a {first} layer; "
                "make shared_blocks a multiple of the length of model.blocks",
            )
        require(
            list(again) == list(range(again[0], again[-1] + 1)) if again else True,
            f"model.repeat_layers={again}: expected consecutive layers, for example (3, 4)",
        )
        require(
            all(0 <= i < self.layers for i in again),
            f"model.repeat_layers={again}: expected layers from 0 to {self.layers - 1}",
        )

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

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: `blocks` repeated to `layers` entries."""
        return tuple(self.blocks[i % len(self.blocks)] for i in range(self.layers))


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    path: str = "sample"
    """Folder written by `skc data prepare`; `sample` is the bundled text, prepared on first use under data/sample."""


@dataclass(frozen=True)
class TrainConfig:
    """How the weights are learned."""

    steps: int = 1000
    """Number of optimizer steps (with train.seconds: at most this many)."""
    seconds: float | None = None
    """Wall-clock budget; progress is then measured by the clock, which pauses during evaluation and compilation."""
    batch: int = 8
    """Rows (windows) per step."""
    seq: int = 512
    """Tokens per row."""
    micro_batch: int | None = None
    """Rows per forward and backward pass, to fit memory; None: all rows at once. Must divide train.batch."""
    lr_embed: float = 3e-3
    """Learning rate of the embedding group."""
    lr_matrix: float = 3e-3
    """Learning rate of the matrix group."""
    lr_vector: float = 3e-3
    """Learning rate of the vector group (gains, scales, biases)."""
    warmup: float = 0.02
    """Share of the run in which the learning rate rises linearly from 0."""
    warmdown: float = 0.4
    """Share of the run, at its end, in which the learning rate falls linearly to train.floor."""
    floor: float = 0.1
    """Learning-rate scale at the very end."""
    beta1: float = 0.9
    """AdamW's decay of the gradient mean."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient."""
    eps: float = 1e-8
    """AdamW's epsilon, added to the root."""
    matrix_rule: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the matrix group; the other groups always take AdamW."""
    muon_momentum: float = 0.95
    """Muon's momentum, after its warm-up."""
    muon_momentum_start: float = 0.85
    """Muon's momentum at step 0."""
    muon_momentum_steps: int = 500
    """Steps in which Muon's momentum rises linearly from its start; 0: it does not."""
    muon_iterations: int = 5
    """Newton-Schulz iterations."""
    muon_coefficients: tuple[float, ...] = (3.4445, -4.775, 2.0315)
    """The three coefficients of the Newton-Schulz polynomial."""
    muon_rows: bool = False
    """Bring every row of the update to length 1 before Newton-Schulz (MuonEq-R)."""
    muon_scale: Literal["ratio", "rms"] = "ratio"
    """Scale of the update: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) to match AdamW's RMS."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrix group; the other groups are not decayed."""
    clip: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2) in the training loss."""
    quantise: Literal["never", "always", "late"] = "never"
    """When forward passes use the stored form of the weights (gradients go straight through): late: in the warm-down,
    once the learning-rate scale is below train.quantise_below; never: weights are rounded after training only."""
    quantise_below: float = 0.5
    """Learning-rate scale below which train.quantise=late switches on."""
    average_from: float | None = None
    """Share of the run after which weights are averaged (EMA), all but ternary ones; scored and stored is the average.
    None: nothing is averaged."""
    average_decay: float = 0.997
    """Decay of the average."""
    average_ternary: bool = False
    """Average ternary weights too (their averages re-quantise badly)."""
    seq_stages: tuple[int, ...] = ()
    """Shorter rows for the start of the run, one length after the other; a step keeps its number of tokens."""
    seq_until: tuple[float, ...] = ()
    """Share of the run at which each of train.seq_stages ends."""
    repeat_from: float = 0.0
    """Share of the run after which model.repeat_layers run a second time (recurrence in depth)."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int | None = 100
    """Steps between validation estimates; None: only at the end."""
    sample_every: int | None = None
    """Steps between samples of text; None: none."""
    save_every: int | None = 200
    """Steps between checkpoints; None: only at the end."""
    keep_every: int | None = None
    """Every how many-th of these checkpoints is kept beside the last one (state/step-N.safetensors); None: none."""

    def __post_init__(self) -> None:
        require_finite("train", self)
        for name in ("lr_embed", "lr_matrix", "lr_vector", "weight_decay", "z_loss"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}: expected a number from 0 up")
        require(self.eps > 0, f"train.eps={self.eps}: expected a positive number")
        for name in ("steps", "batch", "seq", "log_every"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: expected at least 1")
        for name in ("eval_every", "sample_every", "save_every", "keep_every", "seconds", "clip", "micro_batch"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}={value}: expected a positive number, or None")
        require(
            self.batch % self.rows == 0,
            f"train.batch={self.batch} is not divisible by train.micro_batch={self.micro_batch}",
        )
        for name in ("warmup", "warmdown", "floor", "quantise_below", "average_from", "repeat_from"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"train.{name}={value}: expected a share between 0 and 1")
        require(
            self.warmup + self.warmdown <= 1,
            f"train.warmup={self.warmup} and train.warmdown={self.warmdown} overlap: their sum may not exceed 1",
        )
        require(
            len(self.muon_coefficients) == 3 and all(map(math.isfinite, self.muon_coefficients)),
            f"train.muon_coefficients={self.muon_coefficients}: expected three finite numbers",
        )
        for name in ("muon_iterations", "muon_momentum_steps"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}: expected a number from 0 up")
        for name in ("beta1", "beta2", "muon_momentum", "muon_momentum_start", "average_decay"):
            require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)}: expected from 0 to below 1")
        require(
            self.quantise != "late" or (self.warmdown > 0 and self.floor < self.quantise_below),
            f"train.quantise=late would never switch on: it needs a train.warmdown ({self.warmdown}) and a "
            f"train.quantise_below ({self.quantise_below}) above train.floor ({self.floor})",
        )
        require(
            self.keep_every is None or self.save_every is not None,
            f"train.keep_every={self.keep_every} keeps nothing without train.save_every",
        )
        require(
            self.average_from is None or self.average_from < 1,
            f"train.average_from={self.average_from}: nothing would be averaged; expected below 1",
        )
        require(
            not self.average_ternary or self.average_from is not None,
            "train.average_ternary averages nothing without train.average_from",
        )
        self._check_stages()

    def _check_stages(self) -> None:
        stages, until = self.seq_stages, self.seq_until
        require(
            len(stages) == len(until),
            f"train.seq_stages={stages} and train.seq_until={until}: expected as many shares as lengths",
        )
        require(
            all(0 < share <= 1 for share in until) and list(until) == sorted(set(until)),
            f"train.seq_until={until}: expected rising shares above 0 and at most 1",
        )
        for seq in stages:
            require(seq < self.seq, f"train.seq_stages={stages}: {seq} is not shorter than train.seq={self.seq}")
            require(
                seq >= 1 and (self.rows * self.seq) % seq == 0,
                f"train.seq_stages={stages}: {seq} does not divide the {self.rows * self.seq} tokens of a micro-batch",
            )

    @property
    def rows(self) -> int:
        """Rows of one micro-batch, at the full row length."""
        return self.micro_batch or self.batch

    def rows_of(self, seq: int) -> tuple[int, int]:
        """Return the rows of a step and of one micro-batch when rows hold `seq` tokens."""
        return self.tokens_per_step // seq, self.rows * self.seq // seq

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every row length of the run, in the order of use."""
        return (*self.seq_stages, self.seq)

    @property
    def tokens_per_step(self) -> int:
        """Targets of one optimizer step."""
        return self.batch * self.seq


@dataclass(frozen=True)
class EvalConfig:
    """How text is scored."""

    windows: Literal["plain", "sliding", "documents", "stateful"] = "plain"
    """plain: consecutive windows; sliding: overlapping by seq - stride; documents: either, inside each document;
    stateful: consecutive windows of a document, each with the exact state that the one before left."""
    seq: int = 512
    """Longest context of a window, in tokens."""
    stride: int | None = None
    """Targets scored per window after the first (sliding, documents); None: seq, windows do not overlap."""
    batch: int = 8
    """Windows per forward pass (changes speed and memory, not the score)."""
    documents: int | None = None
    """Score only this many documents, drawn at random: an estimate with an error bar, never a score. None: all."""
    train_documents: int = 32
    """Documents of the estimate that is made during training."""
    seed: int = 0
    """Seed of the draw of documents: not the run's, so that runs of other seeds are judged on the same text."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, f"eval.seed={self.seed}: expected from 0 to 2^31 - 1")
        for name in ("seq", "batch", "train_documents"):
            require(getattr(self, name) >= 1, f"eval.{name}={getattr(self, name)}: expected at least 1")
        require(self.documents is None or self.documents >= 2, f"eval.documents={self.documents}: expected at least 2")
        require(
            self.stride is None or 1 <= self.stride <= self.seq,
            f"eval.stride={self.stride}: expected from 1 to eval.seq={self.seq}",
        )
        require(
            self.windows != "sliding" or self.stride is not None,
            "eval.windows=sliding needs eval.stride (for example --eval.stride 64)",
        )
        require(
            self.windows not in ("plain", "stateful") or self.stride in (None, self.seq),
            f"eval.stride={self.stride} has no meaning with eval.windows={self.windows}: use --eval.windows sliding",
        )


@dataclass(frozen=True)
class ExportConfig:
    """How the weights are stored."""

    budget: int = 16_000_000
    """Largest total of artifact and code, in bytes."""
    code_bytes: int = 40_000
    """Bytes of the budget that are reserved for code."""

    def __post_init__(self) -> None:
        require(
            0 <= self.code_bytes < self.budget,
            f"export.code_bytes={self.code_bytes}: expected from 0 to below export.budget={self.budget}",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run: everything that decides its result."""

    preset: str = "debug"
    """Name of the preset that this run started from."""
    seed: int = 1337
    """Seed of the start values and of the order of the data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, f"seed={self.seed}: expected from 0 to 2^31 - 1")
        require(
            self.train.repeat_from < 1 and (self.train.repeat_from == 0 or bool(self.model.repeat_layers)),
            f"train.repeat_from={self.train.repeat_from}: expected a share below 1, and model.repeat_layers to repeat",
        )
        require(
            self.eval.windows != "stateful"
            or self.model.documents == "isolated"
            or "attention" not in self.model.kinds,
            "eval.windows=stateful with packed documents would keep the keys of every token of the text: "
            "use --eval.windows sliding",
        )


def to_json(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON values; a RunConfig also carries the schema number."""
    plain = dataclasses.asdict(config)
    return {"schema": SCHEMA, **plain} if isinstance(config, RunConfig) else plain


def from_json(kind: type, values: Any, where: str = "config") -> Any:
    """Rebuild dataclass `kind` from `to_json`'s values; ConfigError names an unknown or missing key or a wrong type."""
    require(isinstance(values, dict), f"{where}: expected an object, got {type(values).__name__}")
    values = dict(values)
    if kind is RunConfig:
        schema = values.pop("schema", None)
        require(
            schema == SCHEMA,
            f"{where}: schema {schema!r} was written by another version; this one reads {SCHEMA}: train again",
        )
    hints = typing.get_type_hints(kind)
    fields = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            raise ConfigError(f"{where}.{key}: unknown key" + (f"; did you mean {close[0]}?" if close else ""))
    for name in fields:
        require(name in values or name in LATER, f"{where}.{name}: missing")
    return kind(**{n: _coerce(hints[n], values[n], f"{where}.{n}") for n in fields if n in values})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Check a JSON value against a field's type and return it as that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if origin is Literal:
        require(value in arguments, f"{where}={value!r}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is types.UnionType:
        if value is None:
            return None
        return _coerce(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {type(value).__name__}")
        return tuple(_coerce(arguments[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**1023, f"{where}: too large a number")
        return float(value)
    require(type(value) is hint, f"{where}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return one line per field in which two configs of one type differ."""
    if dataclasses.is_dataclass(a):
        lines = []
        for f in dataclasses.fields(a):
            lines += differences(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}" if where else f.name)
        return lines
    return [] if a == b else [f"{where}: {a!r} -> {b!r}"]
