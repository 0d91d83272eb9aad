"""Koopman mixer: a short convolution, then a diagonal recurrence over channels that a Walsh-Hadamard transform mixes
(docs/model.md)."""

from dataclasses import dataclass, replace

from core.checks import require
from core.model.capsules import COUPLING
from core.model.table import TAPS, Init, Model, Part, Rows, State, matrix, output, require_times, vector

MOST_WALSH = 8192
"""Largest Walsh-Hadamard matrix."""


@dataclass(frozen=True)
class Koopman(Part):
    """Layer kind `koopman`, and the recurrent half of `skc`: mix positions by a recurrence."""

    dim: int = 256
    """Channels C, a power of two."""
    times: tuple[float, float] = (0.7, 8.0)
    """Start values of the time constants, in tokens: the shortest and the longest, spread over the channels."""

    FLOPS = "Koopman mixer 4 * C^2 of its two Hadamard products"

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_power("model.koopman.dim", self.dim)
        require_times("model.koopman.times", self.times)

    def rows(self, model: Model) -> Rows:
        """Return the parameters of one layer."""
        width, small = self.dim, Init("normal", 0.01)
        return {
            "value.weight": matrix(model, width, model.dim),
            "gate.weight": matrix(model, width, model.dim),
            "decay.weight": matrix(model, width, model.dim),
            "decay_bias": vector(width, init=Init("rates", *self.times)),
            "conv": vector(width, TAPS, init=1 / TAPS),
            "couple_in": vector(width, COUPLING, init=small),
            "couple_out": vector(width, COUPLING, init=small),
            "state_gain": vector(width, init=1.0),
            **output(model, "o", width),
        }

    def flops(self, model: Model, seq: int) -> int:
        """Return the FLOPs of the two Hadamard products."""
        return 4 * self.dim**2

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return 4 * model.dim + 20 * self.dim

    def state(self, model: Model) -> State:
        """Return the size of the decoding state: what enters the convolution, and the recurrence."""
        return State(TAPS * self.dim)

    def tape(self, model: Model) -> int:
        """Return the size of what enters the convolution, and of the recurrence after every token."""
        return 2 * self.dim

    def mini(self, model: Model, dim: int) -> "Koopman":
        """Return settings of at most 32 channels."""
        return replace(self, dim=min(self.dim, 32))


def require_power(where: str, value: int) -> None:
    """Raise ConfigError unless there is a Walsh-Hadamard matrix of this size."""
    good = 2 <= value <= MOST_WALSH and value & (value - 1) == 0
    require(good, f"{where}={value}: expected a power of two from 2 to {MOST_WALSH} (Walsh-Hadamard)")
