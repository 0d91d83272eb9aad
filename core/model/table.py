"""One row of the parameter table, what every part answers, and the few kinds of rows that most parts are made of."""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from core.checks import require
from core.model.storage import Storage

if TYPE_CHECKING:
    from core.model.config import ModelConfig as Model
else:  # the model's settings hold the parts', whose methods get the model's: an import each way
    Model = Any

Group = Literal["embed", "matrix", "vector", "hash"]
GROUPS: tuple[Group, ...] = ("embed", "matrix", "vector", "hash")
TAPS = 4
"""Taps of a short convolution, the current token included."""


class Init(NamedTuple):
    """A start value: normal (scale = standard deviation), uniform (scale = bound), constant (scale = value); rows and
    columns: the value in the first `until` of them, 0 in the others; rates: log(expm1(1 / t)), so that softplus gives
    1 / t back, with time constants t spread over the last axis from `scale` to `until` at equal ratios; orthogonal:
    rows or columns, whichever are fewer, are at right angles and `scale` long.
    """

    kind: Literal["normal", "uniform", "constant", "rows", "columns", "rates", "orthogonal"]
    scale: float
    until: float = 0.0


class Param(NamedTuple):
    """One row of the table."""

    shape: tuple[int, ...]
    init: Init
    group: Group
    storage: Storage = "float16"
    deviation: float | None = None
    """How many standard deviations of a group the largest code stands for; None: the group's largest weight."""
    scaffold: bool = False
    """Whether it stands while training only (core/engine/scaffolding.py)."""
    slices: int = 1
    """Matrices that lie one below the other in it, of which the optimizer updates each by itself."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def rule(self) -> str:
        """How it is stored, in words."""
        return self.storage + (f" by {self.deviation:g} deviations" if self.deviation else "")


Rows = dict[str, Param]


class State(NamedTuple):
    """Floats that decoding keeps of one sequence: a fixed number, and so many for every token of context."""

    fixed: int = 0
    per_token: int = 0


class Part:
    """What the model asks of the settings of a part; these are the answers of a part that adds nothing."""

    FLOPS = ""
    """What `flops` counts, in words."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""

    def rows(self, model: Model) -> Rows:
        """Return the parameters, by their names below the part's."""
        return {}

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of one token of the forward pass beside the products with rows of the group `matrix`."""
        return 0

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of a token the backward pass needs again; `scores`: those of attention too."""
        return 0

    def state(self, model: Model) -> State:
        """Return the size of the decoding state."""
        return State()

    def tape(self, model: Model) -> int:
        """Return the floats that decoding keeps for every token of a chunk until it is known how many stay."""
        return self.state(model).per_token

    def mini(self, model: Model, dim: int) -> Self:
        """Return settings that show the same in a model that is shrunk from `model` to a width of `dim`, for tests."""
        return self


def matrix(model: Model, out: int, into: int, **other: Any) -> Param:
    """Return the row of a linear layer, a weight (out, in)."""
    scales = {"normal": model.matrix_std, "uniform": into**-0.5, "orthogonal": 1.0}
    drawn = Init(model.matrix_init, scales[model.matrix_init])
    row = Param((out, into), drawn, "matrix", model.matrix_storage, model.deviations.attention)
    return row._replace(**other)


def vector(*shape: int, init: Init | float = 0.0) -> Param:
    """Return the row of gains, scales or biases; a number is the value that they start at."""
    return Param(shape, init if isinstance(init, Init) else Init("constant", init), "vector")


def output(model: Model, name: str, into: int, **other: Any) -> Rows:
    """Return the rows of a projection back to the stream, which starts at 0, and of the gain of the norm before it."""
    rows = {f"{name}.weight": matrix(model, model.dim, into, init=Init("constant", 0.0), **other)}
    return rows | ({f"{name}.gain": vector(into, init=1.0)} if model.output_norm == "gain" else {})


def below(name: str, rows: Rows) -> Rows:
    """Return rows with `name` in front of their names."""
    return {f"{name}.{key}": row for key, row in rows.items()}


def require_times(where: str, times: tuple[float, ...]) -> None:
    """Raise ConfigError unless `times` are the shortest and the longest time constant of Init's rates."""
    good = len(times) == 2 and 0.01 <= times[0] <= times[1] <= 1e6
    require(good, f"{where}={times}: expected two rising numbers from 0.01 to 1e6")
