"""The step plan: every number that changes during a run, as a pure function of step and progress."""

import bisect
import dataclasses
import functools
import math

from core.config import TrainConfig
from core.engine.plan import StepPlan


def progress_by_steps(step: int, config: TrainConfig) -> float:
    """Return the share of the run that is done at the end of `step`, in steps (so that step 0 has a rate above 0)."""
    return (step + 1) / config.steps


def lr_scale(progress: float, config: TrainConfig) -> float:
    """Return the learning-rate scale: linear warm-up, constant, linear or cosine warm-down to the floor.

    `progress` is the share of the run that is done, from 0 to 1; past 1 the floor holds. With floor_rule=clip the
    warm-down is to 0, and the floor holds from where it is met.
    """
    if progress < config.warmup:
        return progress / config.warmup
    start = 1.0 - config.warmdown
    if progress <= start or config.warmdown == 0:
        return 1.0
    done = min((progress - start) / config.warmdown, 1.0)
    fallen = done if config.decay == "linear" else (1.0 - math.cos(math.pi * done)) / 2.0
    return max(1.0 - fallen, config.floor) if config.floor_rule == "clip" else 1.0 + fallen * (config.floor - 1.0)


def decay_scale(progress: float, config: TrainConfig) -> float:
    """Return the factor of the matrix group's weight decay: 1, then in a straight line to `weight_decay_end`."""
    start = config.weight_decay_from
    if progress <= start:
        return 1.0
    return 1.0 + (min(progress, 1.0) - start) / (1.0 - start) * (config.weight_decay_end - 1.0)


def momentum(step: int, config: TrainConfig) -> float:
    """Return Muon's momentum at `step`: a linear warm-up over `muon_momentum_steps`, then constant."""
    done = min(1.0, step / config.muon_momentum_steps) if config.muon_momentum_steps else 1.0
    return config.muon_momentum_start + done * (config.muon_momentum - config.muon_momentum_start)


def tokens_before(step: int, config: TrainConfig) -> int:
    """Return how many tokens the steps before `step` have, where progress is counted in steps."""
    rows = begin = 0
    for stage, until in zip(config.batch_stages, config.batch_until, strict=True):
        end = bisect.bisect_right(range(config.steps), until, key=lambda step: progress_by_steps(step, config))
        rows, begin = rows + stage * (min(step, end) - begin), min(step, end)
    return (rows + config.batch * (step - begin)) * config.seq


def quantise(progress: float, config: TrainConfig) -> bool:
    """Return whether the forward pass uses the stored form of the weights at `progress`."""
    falling = progress > 1.0 - config.warmdown and lr_scale(progress, config) < config.quantise_below
    return config.quantise == "always" or (config.quantise == "late" and falling)


@functools.cache
def quantise_from(config: TrainConfig) -> float:
    """Return the progress from which forward passes use the stored form, to 2^-50: found by halving where it begins."""
    low, high = 0.0, 1.0
    for _ in range(0 if config.quantise == "always" else 50):
        middle = (low + high) / 2
        low, high = (low, middle) if quantise(middle, config) else (middle, high)
    return low


def softness(progress: float, config: TrainConfig) -> float:
    """Return how near to rounding the forward pass comes: from first to last at equal ratios, over the span of it."""
    if config.quantise_soft is None:
        return 0.0
    (first, last), begin = config.quantise_soft, quantise_from(config)
    share = min(max((progress - begin) / (1.0 - begin), 0.0), 1.0)
    return first * (last / first) ** share


def noise(progress: float, config: TrainConfig) -> tuple[float, float]:
    """Return what is left of train.depth_drop and of train.ternary_noise at `progress`: none in the quiet end.

    The noise of weights falls in a straight line there, from where the warm-down begins.
    """
    left, fall = 1.0 - config.quiet - progress, config.warmdown - config.quiet
    if left <= 0:
        return 0.0, 0.0
    return config.depth_drop, config.ternary_noise * (min(1.0, left / fall) if fall > 0 else 1.0)


def snapshot(step: int, progress: float, config: TrainConfig) -> bool:
    """Return whether the average after `step` is taken into the running mean: every so often, at low rates.

    Those are the rates of the warm-down; a run that averages nothing yet has nothing to take.
    """
    if config.snapshot_every is None or not averages(step, progress, config):
        return False
    falling = progress > 1.0 - config.warmdown and lr_scale(progress, config) < config.snapshot_below
    return falling and (step + 1) % config.snapshot_every == 0


def averages(step: int, progress: float, config: TrainConfig) -> bool:
    """Return whether the running average has begun: never with step 0, whose start values must not linger in it."""
    return config.average_from is not None and step > 0 and progress > config.average_from


def average(step: int, progress: float, config: TrainConfig) -> float:
    """Return the decay of the running average: 0 before it starts, so that it is seeded with the weights of then.

    Step 0 is always such a seed: start values must not linger in the average.
    """
    return config.average_decay if averages(step, progress, config) else 0.0


def steps_of(tokens: int, config: TrainConfig) -> int:
    """Return the steps of the shortest run that has `tokens` tokens."""
    fewest = min([config.batch, *config.batch_stages]) * config.seq
    runs = range(1, 1 - (-tokens // fewest))

    def size(steps: int) -> int:
        return tokens_before(steps, dataclasses.replace(config, steps=steps))

    return runs[bisect.bisect_left(runs, tokens, key=size)]


def plan(step: int, progress: float, config: TrainConfig) -> StepPlan:
    """Return the plan of `step` (from 0) at `progress` (0 to 1)."""
    scale = lr_scale(progress, config)
    (rows, seq), (drop, ternary_noise) = config.shape(progress), noise(progress, config)
    return StepPlan(
        step=step,
        rows=rows,
        seq=seq,
        lr_embed=config.lr_embed * scale,
        lr_matrix=config.lr_matrix * scale,
        lr_vector=config.lr_vector * scale,
        lr_hash=config.lr_hash * scale,
        decay_embed=config.weight_decay_embed,
        decay_matrix=config.weight_decay * decay_scale(progress, config),
        decay_vector=config.weight_decay_vector,
        decay_hash=config.weight_decay_hash,
        momentum=momentum(step, config),
        bias1=1.0 - config.beta1 ** (step + 1),
        bias2=1.0 - config.beta2 ** (step + 1),
        average=average(step, progress, config),
        drop=drop,
        ternary_noise=ternary_noise,
        untie=float(progress >= config.untie_from),
        rate=config.rate if progress >= config.rate_from else 0.0,
        quantise=quantise(progress, config),
        softness=softness(progress, config),
        snapshot=snapshot(step, progress, config),
        repeat=progress >= config.repeat_from and step % config.repeat_every == 0,
        route=progress >= config.route_from,
    )
