"""A store of capsules, in which SKC layers and the bank keep values (docs/model.md)."""

from typing import NamedTuple

from core.model.table import Init, Rows, State, vector

COUPLING = 4
"""Rank of the couplings between channels and between capsules."""
FLOOR = 0.5
"""Mass that a capsule's mean is taken over beside what was routed to it: one that got nothing keeps almost nothing."""


class Store(NamedTuple):
    """The shape of a store."""

    heads: int
    capsules: int
    block: int
    shift: bool
    intra: float
    bands: bool
    times: tuple[float, float]

    FLOPS = "capsules 4 * N * C of write and read, the bank's too, and 2 * Q * (H * N + C) of a read of the open block"

    def rows(self) -> Rows:
        """Return the parameters, by their names below the store's."""
        heads, count, block, small = self.heads, self.capsules, self.block, Init("normal", 0.01)
        # The first Walsh function is constant, 1 / sqrt(block): so bands start as a plain sum over the block.
        bands = {"bands": vector(block, count, init=Init("rows", block**0.5, 1))} if self.bands else {}
        return {
            "temperature": vector(2, heads, init=2.0),
            **bands,
            "rate": vector(heads, count, init=Init("rates", *self.times)),
            "couple_in": vector(heads, COUPLING, count, init=small),
            "couple_out": vector(heads, count, COUPLING, init=small),
        }

    def flops(self, width: int) -> int:
        """Return the forward FLOPs per token of a store of `width` channels."""
        inside = 2 * self.block * (self.heads * self.capsules + width) if self.intra else 0
        return 4 * self.capsules * width + inside

    def state(self, width: int) -> State:
        """Return the size of the decoding state of a store of `width` channels."""
        sums = 2 + (self.intra > 0)
        return State(sums * self.capsules * width + (1 + self.shift) * self.heads * self.capsules)
