"""A store of capsules, in which SKC layers and the bank keep values (docs/model.md)."""

from typing import NamedTuple

from core.model.table import Init, Rows, State, vector

COUPLING = 4
"""Rank of the couplings between channels and between capsules."""
FLOOR = 0.5
"""Mass that a capsule's mean is taken over beside what was routed to it: one that got nothing keeps almost nothing."""
NOTHING = 1e-6
"""Energy that the consistency loss adds to what a row's capsules hold: one that stores nothing has a loss of 0."""


class Store(NamedTuple):
    """The shape of a store."""

    width: int
    heads: int
    capsules: int
    block: int
    shift: bool
    intra: float
    bands: bool
    ahead: bool
    times: tuple[float, float]

    FLOPS = (
        "capsules 4 * N * C of write and read, the bank's too, 2 * Q * (H * N + C) of a read of the open block, and "
        "2 * N * C * (1 + K / Q) of a look ahead"
    )

    @property
    def channels(self) -> int:
        """Channels K of a head."""
        return self.width // self.heads

    def rows(self) -> Rows:
        """Return the parameters, by their names below the store's."""
        heads, count, block, small = self.heads, self.capsules, self.block, Init("normal", 0.01)
        # The first Walsh function is constant, 1 / sqrt(block): so bands start as a plain sum over the block.
        bands = {"bands": vector(block, count, init=Init("rows", block**0.5, 1))} if self.bands else {}
        ahead = {
            "ahead_diag": vector(self.channels, init=2.2),  # sigmoid(2.2) = 0.9
            "ahead_in": vector(self.channels, COUPLING, init=Init("normal", 0.05)),
            "ahead_out": vector(self.channels, COUPLING, init=Init("normal", 0.05)),
        }
        return {
            "temperature": vector(2, heads, init=2.0),
            **bands,
            "rate": vector(heads, count, init=Init("rates", *self.times)),
            "couple_in": vector(heads, COUPLING, count, init=small),
            "couple_out": vector(heads, count, COUPLING, init=small),
            **(ahead if self.ahead else {}),
        }

    def flops(self) -> int:
        """Return the forward FLOPs per token."""
        inside = 2 * self.block * (self.heads * self.capsules + self.width) if self.intra else 0
        shown = 2 * self.capsules * self.width
        ahead = shown + shown * self.channels // self.block if self.ahead else 0
        return 2 * shown + inside + ahead

    def state(self) -> State:
        """Return the size of the decoding state."""
        sums = 2 + (self.intra > 0)
        return State(sums * self.capsules * self.width + (1 + self.shift) * self.heads * self.capsules)

    def tape(self) -> int:
        """Return the floats kept of every token of a chunk: routing, as it is and shifted, its values, and its share of
        the capsules after its block."""
        return 2 * self.heads * self.capsules + self.width - (-self.capsules * self.width // self.block)
