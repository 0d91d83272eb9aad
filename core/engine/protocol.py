"""What the lab asks of a backend, and how one is loaded.

Only numpy arrays, Python scalars and frozen dataclasses cross this border.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from core.checks import closest
from core.config import ConfigError, ModelConfig
from core.data.batch import Batch
from core.engine.adapting import AdaptStep
from core.engine.plan import StepPlan
from core.engine.ranks import Ranks
from core.model.adapters import AdapterSpec
from core.model.storage import Stored

Arrays = dict[str, np.ndarray]
DType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class Scoring:
    """How a device likes forward passes of scoring, where nothing learns from them."""

    tokens: int = 0
    """A pass has at least so many, in whole windows."""
    ahead: int = 1
    """Passes that may be under way before the first of them is read."""

    def rows(self, batch: int, seq: int) -> int:
        """Return the windows of `seq` tokens in a pass, if eval.batch is `batch`."""
        return max(batch, self.tokens // seq)


def micro_batches(batch: Batch, most: int, world: int) -> tuple[list[slice], list[float], float]:
    """Return the rows of each micro-batch, its weight, and what the weighted sum is divided by to be the step's mean.

    A micro-batch has `most` rows, or as many as the busiest of `world` ranks has; a last one may have fewer.
    """
    rows, total = len(batch.tokens), batch.total or len(batch.tokens)
    unit = min(most, -(-total // world))
    parts = [slice(i, min(i + unit, rows)) for i in range(0, rows, unit)]
    return parts, [(part.stop - part.start) / unit for part in parts], total / unit


class StepResult(NamedTuple):
    """What one optimizer step reports."""

    loss: float  # mean nats per target, without the z-loss
    grad_norm: float  # global norm before clipping
    finite: bool  # False: loss or gradients were not finite and the weights were left as they were


@dataclass(frozen=True)
class State:
    """A place in a text: what a model needs of everything before it. A value: nothing changes it."""

    model: Any
    """The backend's own arrays, on its device; their size depends on the text only where there is attention."""
    position: np.ndarray
    """(rows,) int64: tokens so far."""
    seen: np.ndarray
    """(rows,) int64: tokens of the open document so far."""

    def seen_after(self, tokens: np.ndarray, n: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Return `seen` after the first `n` (rows,) of `tokens` (rows, seq)."""
        count = tokens.shape[1]
        starts = (tokens == config.bos) & (np.arange(count) < n[:, None]) & (config.documents == "isolated")
        last = count - 1 - np.argmax(starts[:, ::-1], axis=1)
        return np.where(starts.any(axis=1), n - last, self.seen + n)


def counts(tokens: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Return how many of `tokens` (rows, seq) each row keeps, (rows,) int64; ValueError if that cannot be."""
    (rows, seq), given = tokens.shape, np.asarray(n, np.int64)
    if given.shape not in ((), (rows,)) or given.min() < 0 or given.max() > seq:
        raise ValueError(
            f"commit {n} tokens of a chunk of {seq} in {rows} rows; expected 0 to {seq}, for all or for each"
        )
    return np.broadcast_to(given, (rows,)).copy()


class Tape(Protocol):
    """A chunk of tokens that was run from a state, of which each row may keep any number of first tokens."""

    def logits(self) -> np.ndarray:
        """Return the logits of every position, (rows, seq, vocab)."""
        ...

    def best(self) -> np.ndarray:
        """Return the likeliest token of every position, (rows, seq) int; the first of equals."""
        ...

    def nll(self, targets: np.ndarray) -> np.ndarray:
        """Return -log p(target) in nats for every position, (rows, seq)."""
        ...


def begun(state: State | None) -> State:
    """Return the state that a pass began with; a ValueError if it had none."""
    if state is None:
        raise ValueError("commit: this pass began without a state; give `adapted` the state that it goes on from")
    return state


class Adapters(Protocol):
    """Low-rank maps beside matrices, of every row its own, and their moments. A value: nothing changes it."""

    spec: AdapterSpec

    def a(self) -> Arrays:
        """Return A by site, (rows, rank, in): what a later `adapters` may begin with."""
        ...


class PredictedTape(Protocol):
    """A forward pass whose predictions were changed on the device; after a state `commit` takes it like a Tape."""

    def nll(self) -> np.ndarray:
        """Return -log p(target) in nats for every position, (rows, seq)."""
        ...

    def moments(self) -> np.ndarray | None:
        """Return what the sample of the prediction says of its temperature, (2,) float64; None without a sample."""
        ...

    def logprobs(self) -> np.ndarray:
        """Return the whole distributions as log-probabilities, (rows, seq, vocab): for whoever judges them."""
        ...


class AdaptedTape(PredictedTape, Protocol):
    """A pass with adapters, which has the way back for one update as well."""


class Pending(Protocol):
    """A step that may still be running on the device."""

    def result(self) -> StepResult:
        """Wait for the step and return its numbers."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How a backend computes; nothing here changes what is computed beyond rounding."""

    dtype: DType | None = None
    """Compute type; None: bfloat16 on a GPU that has it, float32 elsewhere. float16: MLX only, gradients scaled."""
    exact: bool | None = None
    """Use the float64-safe forms of the ops; None: only in float64."""
    compile: bool | None = None
    """Compile the training step; None: where the backend gains by it."""
    spans: tuple[tuple[int, int, int], ...] = ()
    """(rows, tokens a row, documents in them): for how many documents attention without a mask has room in batches of
    this shape, by the text (core/training/spans.py); MLX has a mask."""
    newton_schulz: Literal["float32", "bfloat16"] | None = None
    """Type of Newton-Schulz's products in Muon; masters and momentum stay wide. None: that of the masters, but bfloat16
    where torch computes in bfloat16 on a GPU."""
    micro_tokens: int | None = 8192
    """MLX on a GPU: tokens of a micro-batch at most; None: train.micro_batch as it is, or a refusal."""
    wire: Literal["bfloat16"] | None = None
    """Type in which several ranks send their gradients to each other and add them up; masters and moments stay wide.
    None: that of the masters."""
    fast_blas: bool = True
    """MLX on Linux: load a fast BLAS into the process before MLX."""


def wire_note(options: EngineOptions, ranks: Ranks) -> tuple[str, ...]:
    """Return what there is to say of how gradients travel."""
    return (f"gradients sent in {options.wire}",) if options.wire and ranks.world > 1 else ()


class Engine(Protocol):
    """A model, its optimizer and a device."""

    backend: str
    """`mlx` or `cuda`."""
    device: str
    """What it runs on, in words."""
    dtype: str
    """Compute type."""
    notes: tuple[str, ...]
    """Choices that were made at build time, one line each, printed at the start of a run."""
    quantise: bool
    """Whether forward passes use the stored form of the weights: what the last step's plan, or a load, said."""
    ranks: Ranks
    """The processes that train together: they call train_step and optimizer in the same order."""
    scoring: Scoring
    """How forward passes of scoring are best made."""

    def train_step(self, batch: Batch, plan: StepPlan) -> Pending:
        """Start one optimizer step on this rank's rows; at most two are in flight."""
        ...

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return -log p(target) in nats for every position: (rows, seq) int -> (rows, seq) float."""
        ...

    def nll_later(self, tokens: np.ndarray, targets: np.ndarray, often: bool) -> Callable[[], np.ndarray]:
        """Start what `nll` does and return a function that waits for it; the weights are those of now.

        `often`: so many rows of this shape will come that compiling for them pays.
        """
        ...

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the final (softcapped) logits: (rows, seq) int -> (rows, seq, vocab) float."""
        ...

    def predicted(self, tokens: np.ndarray, targets: np.ndarray, prediction: Any, state: State | None = None) -> Any:
        """Run (rows, seq) tokens, on from `state` if there is one, and return the PredictedTape of their targets.

        `prediction`: a core.scoring.predictions.Prediction, which says how the distributions are changed.
        """
        ...

    def second_moments(self, tokens: np.ndarray, names: Sequence[str] | None = None) -> Arrays:
        """Return, by name, the sum over (rows, seq) tokens of a a^T, (in, in), of what enters each matrix `names`.

        None: every matrix that multiplies what comes in, the tied embedding as the head's. A layer that is used several
        times counts every use. Summed in one forward pass, in float32 or wider. ConfigError for another name.
        """
        ...

    def start(self, rows: int) -> State:
        """Return the state before the first token of `rows` texts."""
        ...

    def chunk(self, state: State, tokens: np.ndarray) -> Tape:
        """Run (rows, seq) tokens on from `state`: what `logits` of the whole text would say, at these positions."""
        ...

    def commit(self, tape: Any, n: int | np.ndarray) -> State:
        """Return the state after the first `n` tokens of a chunk, 0 or more: one number, or one for each row."""
        ...

    def forget(self, state: State, rows: np.ndarray) -> State:
        """Return the state with nothing read yet in the rows that are marked, (rows,) bool: others may begin."""
        ...

    def adapters(self, spec: AdapterSpec, rows: int, slot: int, a: Arrays | None = None) -> Any:
        """Return adapters (Adapters) of `rows` rows whose B and moments are 0.

        A is `a` (Adapters.a), or drawn by the seed of `spec`, `slot`, site and row: of a row that is alone the same.
        """
        ...

    def adapted(
        self,
        adapters: Any,
        tokens: np.ndarray,
        targets: np.ndarray,
        prediction: Any = None,
        state: State | None = None,
        often: bool = False,
    ) -> Any:
        """Run (rows, seq) tokens with adapters, and keep the way back; from `state` on it can be committed, too.

        The forward pass is run once, for nats and gradients. No gradient reaches a weight, nor what made `state`.
        `prediction` changes the nats that the tape (AdaptedTape) tells, not those that are learned from. `often`: so
        many passes of this shape will come, without a state, that compiling for them pays.
        """
        ...

    def adapt(self, tape: Any, shares: np.ndarray, step: AdaptStep) -> Any:
        """Return the adapters of a pass after one update of each row by the sum of `shares` (rows, seq) times its nats.

        A row whose shares are all 0 stays as it is, bit for bit. ValueError for a tape that was learned from before.
        """
        ...

    def reset(self, adapters: Any, rows: np.ndarray, keep_a: bool) -> Any:
        """Return adapters with B and moments 0 in the rows that are marked, (rows,) bool; A as it is or as it began."""
        ...

    def weights(self) -> Arrays:
        """Return the weights that `nll`, `logits` and `activations` use, in table order.

        They are the exported set (`core.engine.optimizer_state.exported`), in its stored form if `quantise`.
        """
        ...

    def quantised(self) -> dict[str, Stored]:
        """Return codes and scales of the exported set, as a forward pass with `quantise` computes them."""
        ...

    def params(self) -> Arrays:
        """Return the master weights in table order, as float32 (float64 in float64)."""
        ...

    def load_params(self, params: Arrays, quantise: bool = False) -> None:
        """Replace every weight and set its running average to it; a missing, extra or misshapen one is a ValueError.

        Weights out of an artifact are already what was stored: `quantise=False` uses them as they are.
        """
        ...

    def optimizer(self) -> Arrays:
        """Return the optimizer state as `<param>.<slot>`."""
        ...

    def load_optimizer(self, state: Arrays) -> None:
        """Replace the optimizer state; strict like `load_params`."""
        ...

    def loosen(self, names: Sequence[str]) -> None:
        """Let the scored weights `names` move, from what they are, with momenta of 0; none is rounded again.

        Until `tighten` all that scores uses them. The masters stay as they are, and must not be trained meanwhile.
        ValueError for a name that is not in the table.
        """
        ...

    def descend(self, batch: Batch, step: AdaptStep) -> StepResult:
        """Take one step of SGD with momentum on this rank's rows, as many as there are; a target of -1 is a pad.

        The loss is the mean over the targets of all ranks, which call it together, in a forward pass as `nll` makes it.
        Loss or gradients that are not finite leave the weights as they were.
        """
        ...

    def loosened(self) -> Arrays:
        """Return the weights that may move, and their momenta as `<param>.m`."""
        ...

    def load_loosened(self, arrays: Arrays) -> None:
        """Replace the weights that may move and their momenta; strict like `load_params`."""
        ...

    def forget_momenta(self) -> None:
        """Set the momenta of the weights that may move to 0."""
        ...

    def tighten(self) -> None:
        """Score with the weights of before `loosen` again."""
        ...

    def twin(self, config: Any, params: Arrays | None = None) -> Any:
        """Return a twin (core.twin.protocol.Twin) of the scored weights, which must stay as they are.

        `config`: a core.twin.settings.TwinConfig; a ConfigError if it has no use in this model. `params` None: as
        core.twin.params.twin_start has it.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Return what the device tells: peak_bytes and active_bytes of arrays, or process_bytes; and traces.

        A device with memory of its own adds limit_bytes, all of it.

        `traces` counts compilations of the training step's parts: the whole of it in MLX; in torch the loss, the
        quantisers, every bank's update and the averages.
        """
        ...


def named_matrices(names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Return the matrices that were asked for (None: all that are known); ConfigError for one that is not known."""
    for name in names or ():
        if name not in known:
            close = closest(name, known)
            hint = f"did you mean {close}?" if close else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{name}: is no matrix that multiplies what comes in; {hint}")
    return list(known if names is None else names)


def step(engine: Engine, state: State, tokens: np.ndarray) -> tuple[np.ndarray, State]:
    """Run one token per row, (rows,) int, on from `state`; return the logits (rows, vocab) and the state after it."""
    tape = engine.chunk(state, np.asarray(tokens)[:, None])
    return tape.logits()[:, 0], engine.commit(tape, 1)
