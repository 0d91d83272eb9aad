"""What one optimizer step uses: core/training/schedule.py plans it, an engine computes none of it."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """Every number and switch of one step; the fields that are floats go to the device together (NUMBERS)."""

    step: int
    rows: int
    """Rows of the step, on all ranks together."""
    seq: int
    """Tokens per row."""
    lr_embed: float
    lr_matrix: float
    lr_vector: float
    lr_hash: float
    decay_embed: float
    """Decoupled weight decay of a group, per unit of its learning rate."""
    decay_matrix: float
    decay_vector: float
    decay_hash: float
    momentum: float
    """Muon's momentum."""
    bias1: float
    """1 - beta1^(step + 1)."""
    bias2: float
    """1 - beta2^(step + 1)."""
    average: float
    """Decay of the running average of the weights; 0: the average is the weights."""
    drop: float
    """Share of rows in which the branches of the last pass through a layer are left out (train.depth_drop)."""
    ternary_noise: float
    """Standard deviation of the noise of ternary weights, in scales of their groups."""
    untie: float
    """Share with which an untied head's own table counts: 0 or 1."""
    rate: float
    """Weight in the training loss of the bits that a weight on a grid takes; 0 before train.rate_from."""
    quantise: bool
    """Whether the forward pass uses the stored form of the weights."""
    softness: float
    """How near to rounding the forward pass comes while `quantise` is on (train.quantise_soft); 0: it rounds."""
    snapshot: bool
    """Whether the running mean of the average takes it in after this step."""
    repeat: bool
    """Whether layers that are to be repeated are."""
    route: bool = True
    """Whether tokens are sent to experts (train.route_from)."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values of NUMBERS."""
        return tuple(getattr(self, name) for name in NUMBERS)


NUMBERS = tuple(field.name for field in dataclasses.fields(StepPlan) if field.type is float)
"""What an engine hands to its device as one array, by name: compiled code takes new values without a compilation."""
