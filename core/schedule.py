"""The step plan: every number that changes during a run, as a pure function of step and progress."""

from dataclasses import astuple, dataclass

from core.config import TrainConfig

NUMBERS = ("lr_embed", "lr_matrix", "lr_vector", "weight_decay", "momentum", "bias1", "bias2")
"""The fields of a StepPlan that an engine hands to its optimizer, in this order."""


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step uses; an engine computes none of it."""

    step: int
    lr_embed: float
    lr_matrix: float
    lr_vector: float
    weight_decay: float
    momentum: float
    """Muon's momentum."""
    bias1: float
    """1 - beta1^(step + 1)."""
    bias2: float
    """1 - beta2^(step + 1)."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values of NUMBERS."""
        return astuple(self)[1:]


def progress_by_steps(step: int, config: TrainConfig) -> float:
    """Return the share of the run that is done at the end of `step`, in steps (so that step 0 has a rate above 0)."""
    return (step + 1) / config.steps


def lr_scale(progress: float, config: TrainConfig) -> float:
    """Return the learning-rate scale: linear warm-up, constant, linear warm-down to the floor.

    `progress` is the share of the run that is done, from 0 to 1; past 1 the floor holds.
    """
    if progress < config.warmup:
        return progress / config.warmup
    start = 1.0 - config.warmdown
    if progress <= start or config.warmdown == 0:
        return 1.0
    done = min((progress - start) / config.warmdown, 1.0)
    return 1.0 + done * (config.floor - 1.0)


def momentum(step: int, config: TrainConfig) -> float:
    """Return Muon's momentum at `step`: a linear warm-up over `muon_momentum_steps`, then constant."""
    done = min(1.0, step / config.muon_momentum_steps) if config.muon_momentum_steps else 1.0
    return config.muon_momentum_start + done * (config.muon_momentum - config.muon_momentum_start)


def plan(step: int, progress: float, config: TrainConfig) -> StepPlan:
    """Return the plan of `step` (from 0) at `progress` (0 to 1)."""
    scale = lr_scale(progress, config)
    return StepPlan(
        step=step,
        lr_embed=config.lr_embed * scale,
        lr_matrix=config.lr_matrix * scale,
        lr_vector=config.lr_vector * scale,
        weight_decay=config.weight_decay,
        momentum=momentum(step, config),
        bias1=1.0 - config.beta1 ** (step + 1),
        bias2=1.0 - config.beta2 ** (step + 1),
    )
