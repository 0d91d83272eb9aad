"""The settings of training: the docstring under a field is its help text (import them from core/config.py)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from core.checks import require, require_limits

POLAR_EXPRESS = (
    8.156554524902461, -22.48329292557795, 15.878769915207462,
    4.042929935166739, -2.808917465908714, 0.5000178451051316,
    3.8916678022926607, -2.772484153217685, 0.5060648178503393,
    3.285753657755655, -2.3681294933425376, 0.46449024233003106,
    2.3465413258596377, -1.7097828382687081, 0.42323551169305323,
)  # fmt: skip
"""train.muon_coefficients of five iterations (Amsel et al. 2025): they end nearer 1 than five of one polynomial."""
MOST_STEPS = 10_000_000
"""Most steps of a run: what a run has that only the clock ends."""
NO_STAGES: dict[str, Any] = dict.fromkeys(("seq_stages", "seq_until", "batch_stages", "batch_until"), ())
"""Changes that give every step of a run one shape."""
MOST_ROWS = 1 << 20
"""Most rows of a batch."""
MOST_HEADS = 64
"""Most further heads of a run."""
MOST_TOKENS = 1 << 24
"""Longest row."""
MOST_TOGETHER = 1 << 28
"""Most tokens of a batch."""


def check_tokens(section: str, batch: int, seq: int) -> None:
    """Raise ConfigError for a batch of more tokens than a machine has memory for."""
    good = batch * seq <= MOST_TOGETHER
    require(good, f"{section}.batch={batch} rows of {section}.seq={seq} tokens: expected at most {MOST_TOGETHER:,}")


@dataclass(frozen=True)
class TrainConfig:
    """How the weights are learned."""

    steps: int = 1000
    """Number of optimizer steps (with train.seconds: at most this many)."""
    seconds: float | None = None
    """Wall-clock budget; progress is then measured by the clock, which pauses during evaluation and compilation."""
    reserve_seconds: float = 0.0
    """Seconds of train.seconds that are left for what follows training and reads its text (calibration)."""
    batch: int = 8
    """Rows (windows) per step."""
    seq: int = 512
    """Tokens per row."""
    micro_batch: int | None = None
    """Rows per forward and backward pass; None: all rows at once. Must divide train.batch. An engine halves it until it
    should fit in memory, and says so."""
    lr_embed: float = 3e-3
    """Learning rate of the embedding group."""
    lr_matrix: float = 3e-3
    """Learning rate of the matrix group."""
    lr_vector: float = 3e-3
    """Learning rate of the vector group (gains, scales, biases)."""
    lr_hash: float = 0.02
    """Learning rate of the hash group (tables of n-gram memories)."""
    warmup: float = 0.02
    """Share of the run in which the learning rate rises linearly from 0."""
    warmdown: float = 0.4
    """Share of the run, at its end, in which the learning rate falls to train.floor."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of that fall."""
    floor: float = 0.1
    """Learning-rate scale at the very end."""
    floor_rule: Literal["reach", "clip"] = "reach"
    """reach: the fall ends at the floor; clip: it aims at 0, and the floor holds from where it is met."""
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
    """The three coefficients of the Newton-Schulz polynomial, or three for every iteration one after the other."""
    muon_rows: bool = False
    """Bring every row of the update to length 1 before Newton-Schulz (MuonEq-R)."""
    muon_scale: Literal["ratio", "rms"] = "ratio"
    """Scale of the update: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) to match AdamW's RMS."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrix group."""
    weight_decay_end: float = 1.0
    """Factor of the matrix group's decay at the very end, to which it goes in a straight line."""
    weight_decay_from: float = 0.7
    """Share of the run at which it leaves 1 for train.weight_decay_end."""
    weight_decay_embed: float = 0.0
    """Decoupled weight decay of the embedding group."""
    weight_decay_vector: float = 0.0
    """Decoupled weight decay of the vector group."""
    weight_decay_hash: float = 0.0
    """Decoupled weight decay of the hash group."""
    clip: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2) in the training loss."""
    mtp_heads: int = 0
    """Further heads that stand while training only: head k predicts the token k places behind the next one."""
    mtp_weight: float = 0.2
    """Weight of the further heads' mean loss in the training loss."""
    consistency: float = 0.0
    """Weight in the training loss of how far capsules are from what is shown of them a block before (docs/model.md)."""
    quantise: Literal["never", "always", "late"] = "never"
    """When forward passes use the stored form of the weights (gradients go straight through): late: in the warm-down,
    once the learning-rate scale is below train.quantise_below; never: weights are rounded after training only."""
    quantise_below: float = 0.5
    """Learning-rate scale below which train.quantise=late switches on."""
    quantise_soft: tuple[float, float] | None = None
    """First and last sharpness of soft rounding, in place of rounding while train.quantise is on; between them it rises
    at equal ratios. 0.01: next to no rounding, 1000: all but hard; int storages only. None: hard."""
    rate: float = 0.0
    """Weight in the training loss of the bits that an artifact keeps per weight of an int storage, by how often its
    tensor has each code (docs/model.md); the loss that is reported is without it."""
    rate_from: float = 0.0
    """Share of the run after which train.rate counts."""
    average_from: float | None = None
    """Share of the run after which weights are averaged (EMA), all but ternary ones; scored and stored is the average.
    None: nothing is averaged."""
    average_decay: float = 0.997
    """Decay of the average."""
    average_ternary: bool = False
    """Average ternary weights too (their averages re-quantise badly)."""
    snapshot_every: int | None = None
    """Steps between snapshots of the average, whose mean is scored and stored in its place; None: none are taken."""
    snapshot_below: float = 0.2
    """Learning-rate scale in the warm-down below which they are taken."""
    seq_stages: tuple[int, ...] = ()
    """Shorter rows for the start of the run, one length after the other; a step keeps its number of tokens."""
    seq_until: tuple[float, ...] = ()
    """Share of the run at which each of train.seq_stages ends."""
    batch_stages: tuple[int, ...] = ()
    """Fewer rows of train.seq tokens than train.batch for the start of the run, one number after the other: a step has
    fewer tokens then."""
    batch_until: tuple[float, ...] = ()
    """Share of the run at which each of train.batch_stages ends."""
    repeat_from: float = 0.0
    """Share of the run after which model.repeat_layers run a second time (recurrence in depth)."""
    repeat_every: int = 1
    """Steps from one whose layers are repeated to the next; those between run every layer once. Scoring repeats."""
    untie_from: float = 0.0
    """Share of the run after which an untied head (model.head.untied) has vectors of its own."""
    depth_drop: float = 0.0
    """Share of rows in which the last pass through a layer leaves out its mixer, or its MLP; earlier passes fewer, in a
    straight line (stochastic depth)."""
    ternary_noise: float = 0.0
    """Standard deviation of noise that is added to ternary weights before they are rounded, in scales of their groups;
    it falls to 0 in the warm-down."""
    quiet: float = 0.1
    """Share of the run, at its end, without either noise."""
    router_balance: float = 0.01
    """Weight of the loss that grows when the routers of model.experts send most of a row to few of them."""
    route_from: float = 0.0
    """Share of the run after which tokens are sent to model.experts; before it only the shared one is trained."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int | None = 100
    """Steps between validation estimates; None: only at the end."""
    sample_every: int | None = None
    """Steps between samples of text; None: none."""
    save_every: int | None = 200
    """Steps between checkpoints; None: only at the end."""
    save_minutes: float | None = 10.0
    """Minutes after which a checkpoint is made beside those, at the next log line; None: only those."""
    keep_every: int | None = None
    """Every how many-th checkpoint of train.save_every is kept beside the last one (state/step-N.safetensors)."""

    def __post_init__(self) -> None:
        limits = {"steps": MOST_STEPS, "batch": MOST_ROWS, "micro_batch": MOST_ROWS, "seq": MOST_TOKENS}
        limits["mtp_heads"] = MOST_HEADS
        require_limits("train", self, MOST_STEPS, **limits, seq_stages=MOST_TOKENS, batch_stages=MOST_ROWS)
        check_tokens("train", self.batch, self.seq)
        rates = [f"lr_{group}" for group in ("embed", "matrix", "vector", "hash")]
        decays = ["weight_decay", *(f"weight_decay_{name}" for name in ("embed", "vector", "hash", "end"))]
        others = (
            "z_loss", "reserve_seconds", "mtp_heads", "mtp_weight", "ternary_noise", "consistency", "router_balance",
            "rate",
        )  # fmt: skip
        for name in (*rates, *decays, *others):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}: expected a number from 0 up")
        require(self.eps > 0, f"train.eps={self.eps}: expected a positive number")
        for name in ("steps", "batch", "seq", "log_every", "repeat_every"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: expected at least 1")
        every = ("eval_every", "sample_every", "save_every", "save_minutes", "keep_every", "snapshot_every")
        for name in (*every, "seconds", "clip", "micro_batch"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}={value}: expected a positive number, or None")
        require(
            self.batch % self.rows == 0,
            f"train.batch={self.batch} is not divisible by train.micro_batch={self.micro_batch}",
        )
        for name in (
            "warmup", "warmdown", "floor", "quantise_below", "average_from", "repeat_from", "weight_decay_from",
            "snapshot_below", "untie_from", "quiet", "route_from", "rate_from",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"train.{name}={value}: expected a share between 0 and 1")
        require(
            self.warmup + self.warmdown <= 1,
            f"train.warmup={self.warmup} and train.warmdown={self.warmdown} overlap: their sum may not exceed 1",
        )
        self._check_stages()
        self._check_rules()

    def _check_rules(self) -> None:
        require(
            self.warmdown > 0 or (self.decay, self.floor_rule) == ("linear", "reach"),
            f"train.decay={self.decay} and train.floor_rule={self.floor_rule} change nothing without a train.warmdown",
        )
        require(
            self.weight_decay_end == 1 or (self.weight_decay > 0 and self.weight_decay_from < 1),
            f"train.weight_decay_end={self.weight_decay_end} changes nothing: it needs a train.weight_decay "
            f"({self.weight_decay}) above 0 and a train.weight_decay_from ({self.weight_decay_from}) below 1",
        )
        stop = self.train_stop
        require(
            self.reserve_seconds == 0 or (stop is not None and stop > 0),
            f"train.reserve_seconds={self.reserve_seconds}: expected less than train.seconds={self.seconds}",
        )
        for name in ("muon_iterations", "muon_momentum_steps"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}: expected a number from 0 up")
        numbers = len(self.muon_coefficients)
        require(
            numbers in (3, 3 * max(1, self.muon_iterations))
            and all(map(math.isfinite, self.muon_coefficients))
            and (numbers >= len(POLAR_EXPRESS) or self.muon_coefficients != POLAR_EXPRESS[:numbers]),
            f"train.muon_coefficients: {numbers} numbers for train.muon_iterations={self.muon_iterations}: expected "
            "three finite ones, or three for each iteration (made for that many: a part of a longer list will not do)",
        )
        for name in ("beta1", "beta2", "muon_momentum", "muon_momentum_start", "average_decay", "depth_drop"):
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
        self._check_rounding()
        noisy, quiet = self.depth_drop > 0 or self.ternary_noise > 0, f"train.quiet={self.quiet}"
        require(
            noisy or self.quiet == TrainConfig.quiet,
            f"{quiet} ends no noise: it needs a train.depth_drop or a train.ternary_noise, or leave it out",
        )
        require(not noisy or 0 < self.quiet < 1, f"{quiet}: expected a share above 0 and below 1, without noise")
        require(
            self.ternary_noise == 0 or self.quantise == "always",
            f"train.ternary_noise={self.ternary_noise} moves weights that are rounded from the first step on: it needs "
            f"train.quantise=always, not {self.quantise}",
        )
        require(
            self.mtp_heads < min(self.lengths),
            f"train.mtp_heads={self.mtp_heads}: in rows of {min(self.lengths)} tokens the last head has no target; "
            "expected fewer heads than tokens",
        )

    def _check_rounding(self) -> None:
        require(
            self.rate_from < 1 and (self.rate_from == 0 or self.rate > 0),
            f"train.rate_from={self.rate_from}: expected a share below 1, and a train.rate that counts from there on",
        )
        soft, below = self.quantise_soft, self.snapshot_below
        require(
            soft is None or len(soft) == 2 and 0.01 <= soft[0] <= soft[1] <= 1000,
            f"train.quantise_soft={soft}: expected two rising numbers from 0.01 to 1000, for example (1, 16)",
        )
        require(
            soft is None or self.quantise != "never",
            "train.quantise_soft rounds nothing with train.quantise=never: take late or always",
        )
        if self.snapshot_every is None:
            return
        require(self.average_from is not None, "train.snapshot_every takes nothing without train.average_from")
        require(
            self.warmdown > 0 and self.floor < below,
            f"train.snapshot_every={self.snapshot_every} would never take one: it needs a train.warmdown "
            f"({self.warmdown}), and a train.snapshot_below ({below}) above train.floor ({self.floor})",
        )

    def _check_stages(self) -> None:
        for name, what in (("seq", "lengths"), ("batch", "numbers of rows")):
            stages, until = getattr(self, f"{name}_stages"), getattr(self, f"{name}_until")
            require(
                len(stages) == len(until),
                f"train.{name}_stages={stages} and train.{name}_until={until}: expected as many shares as {what}",
            )
            require(
                all(0 < share <= 1 for share in until) and list(until) == sorted(set(until)),
                f"train.{name}_until={until}: expected rising shares above 0 and at most 1",
            )
        for rows in self.batch_stages:
            where = f"train.batch_stages={self.batch_stages}: {rows}"
            require(1 <= rows < self.batch, f"{where}: expected from 1 to below train.batch={self.batch}")
            least = self.micro_batch or 1
            require(rows % least == 0, f"{where} is not divisible by train.micro_batch={self.micro_batch}")
        for seq in self.seq_stages:
            where = f"train.seq_stages={self.seq_stages}: {seq}"
            require(seq < self.seq, f"{where} is not shorter than train.seq={self.seq}")
            for rows in (self.rows, *self.batch_stages):
                require(
                    seq >= 1 and (rows * self.seq) % seq == 0,
                    f"{where} does not divide the {rows * self.seq} tokens of a micro-batch",
                )

    @property
    def auxiliary(self) -> dict[str, float]:
        """Weights of the auxiliary losses that the training loss has, by name (core.model.context.Training)."""
        weights = {"consistency": self.consistency, "router_balance": self.router_balance}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def rows(self) -> int:
        """Rows of one micro-batch, at the full row length."""
        return self.micro_batch or self.batch

    def rows_of(self, seq: int) -> tuple[int, int]:
        """Return the rows of a step and of one micro-batch (at least one) when rows hold `seq` tokens."""
        return self.tokens_per_step // seq, max(1, self.rows * self.seq // seq)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every row length of the run, in the order of use."""
        return (*self.seq_stages, self.seq)

    def shape(self, progress: float) -> tuple[int, int]:
        """Return the rows of a step, and the tokens of each, at `progress`: of the stages that have not ended."""
        rows, seq = (
            next((value for value, until in zip(stages, ends, strict=True) if progress <= until), last)
            for stages, ends, last in (
                (self.batch_stages, self.batch_until, self.batch), (self.seq_stages, self.seq_until, self.seq),
            )
        )  # fmt: skip
        return rows * self.seq // seq, seq

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every shape of the run's steps, (rows, tokens of each), in the order of use."""
        ends = sorted({*self.batch_until, *self.seq_until, math.inf})
        return tuple(dict.fromkeys(map(self.shape, ends)))

    @property
    def tokens_per_step(self) -> int:
        """Targets of one optimizer step, when no stage of train.batch_stages is left."""
        return self.batch * self.seq

    @property
    def train_stop(self) -> float | None:
        """Seconds after which training ends: train.seconds but for the reserve; None: only train.steps end it."""
        return None if self.seconds is None else self.seconds - self.reserve_seconds
