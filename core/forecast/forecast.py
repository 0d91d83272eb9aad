"""The plan of a run before it starts: how far it gets, when its phases begin, what it needs, which limits it passes.

Measured costs come from core/forecast/probe.py; what follows from them is walked through here step by step, with the
schedule's own functions (core/training/schedule.py) and the loop's own (core/training/loop.py).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from core.config import RunConfig, TrainConfig, require
from core.engine.plan import StepPlan
from core.training.loop import Due, done, due, progress_of
from core.training.schedule import lr_scale, plan

MOST_WALKED = 200_000
"""Most steps of a run that is gone through step by step: seconds of time, 150 MB."""


class StepKind(NamedTuple):
    """What decides the time of a step, as far as it changes during a run."""

    rows: int
    """Rows of the step."""
    seq: int
    """Tokens per row."""
    quantise: bool
    """Forward passes use the stored form of the weights."""
    repeat: bool
    """Repeated layers are repeated."""
    route: bool = True
    """Tokens are sent to experts."""

    @classmethod
    def of(cls, now: StepPlan) -> "StepKind":
        """Return the kind of a planned step."""
        return cls(now.rows, now.seq, now.quantise, now.repeat, now.route)

    def describe(self, config: RunConfig) -> str:
        """Return the kind in words."""
        stored = ", stored weights" if self.quantise else ""
        rows = f"{self.rows:,} rows" if config.train.batch_stages else "rows"
        again = ", repeated layers" * bool(self.repeat and config.model.repeat_layers)
        sent = ", experts" * bool(self.route and config.train.route_from)
        return f"{rows} of {self.seq} tokens{stored}{again}{sent}"


class Passes(NamedTuple):
    """What scoring costs."""

    count: int
    """Forward passes of the busiest rank."""
    first: float
    """Seconds until the first pass is done: counting bytes, reading the text."""
    cold: float
    """The same the first time in a process, which compiles."""
    each: float
    """Seconds of every later pass."""

    def seconds(self, cold: bool = False) -> float:
        """Return the seconds of the whole."""
        return (self.cold if cold else self.first) + (self.count - 1) * self.each


@dataclass(frozen=True)
class Costs:
    """What the probe measured, in seconds and bytes; of several ranks, the slowest and the largest."""

    steps: dict[StepKind, float]
    ahead: int
    """Steps that the host is ahead of the device, at most."""
    warm_up: float
    estimate: Passes
    scoring: Passes
    plugins: Passes | None
    samples: float
    checkpoint: float
    checkpoint_bytes: int
    export: float
    """Rounding, packing, compressing and decoding; not the disk."""
    memory: float
    """Of a device, or, on a CPU, of all processes of the fullest machine."""
    memory_of: str
    memory_limit: float

    def step(self, kind: StepKind) -> float:
        """Return the seconds of a step; of a kind too rare to have been measured, those of the slowest."""
        return self.steps.get(kind, max(self.steps.values()))


class Course(NamedTuple):
    """A run, step by step."""

    plans: list[StepPlan]
    rates: list[float]
    """Learning-rate scale of every step."""
    began: list[float]
    """Training seconds when each step was planned."""
    due: list[Due]
    """What follows each step."""
    seconds: float
    """Training time."""


class Phase(NamedTuple):
    """Neighbouring steps in which something holds."""

    name: str
    steps: tuple[int, int]
    """From the first one to the one after the last."""
    seconds: tuple[float, float]
    """Training time at both ends."""


class Limit(NamedTuple):
    """A figure and what it should not pass."""

    what: str
    value: float
    limit: float
    unit: str
    binding: bool
    """The run cannot be made, or is not what it claims to be, if it is over."""
    note: str = ""

    @property
    def over(self) -> bool:
        """Whether the limit is passed."""
        return self.value > self.limit


def check_steps(steps: int) -> None:
    """Raise ConfigError for a run of more steps than are gone through."""
    words = f"train.steps: {steps:,} or more; --dry-run goes through {MOST_WALKED:,} at most: give fewer, and scale up"
    require(steps <= MOST_WALKED, words)


def walk(settings: TrainConfig, costs: Costs) -> Course:
    """Go through the training loop with steps of known cost: the host plans a step as soon as the device lets it."""
    plans, rates, began, follows, ends = [], [], [], [], []
    host = device = 0.0
    while not done(len(plans), host, settings):
        check_steps(len(plans) + 1)
        progress = progress_of(len(plans), host, settings)
        plans.append(plan(len(plans), progress, settings))
        rates.append(lr_scale(progress, settings))
        began.append(host)
        device = max(device, host) + costs.step(StepKind.of(plans[-1]))
        ends.append(device)
        follows.append(due(len(plans), settings))
        if follows[-1].read:
            host = device
        elif len(ends) > costs.ahead:
            host = max(host, ends[-1 - costs.ahead])
    return Course(plans, rates, began, follows, device)


def phases(config: RunConfig, course: Course) -> list[Phase]:
    """Return the phases of a run: learning rate, row lengths, stored weights, averaging, repeated layers, experts."""
    plans, settings = course.plans, config.train
    top = int(np.argmax(course.rates))
    rates = [
        "constant rate" if rate == 1.0 else "warm-up" if i <= top else "warm-down"
        for i, rate in enumerate(course.rates)
    ]
    labels: list[Sequence[str | None]] = [rates]
    if settings.batch_stages:
        labels.append([f"{now.rows:,} rows of {now.seq} tokens" for now in plans])
    elif settings.seq_stages:
        labels.append([f"rows of {now.seq} tokens" for now in plans])
    if settings.quantise == "late":
        labels.append(["stored weights" if now.quantise else None for now in plans])
    if settings.average_from is not None:
        labels.append(["averaging" if now.average else None for now in plans])
    if config.model.repeat_layers:
        every = settings.repeat_every  # those between count with the last one that repeats
        words = "repeated layers" if every == 1 else f"repeated layers every {every} steps"
        labels.append([words if plans[i - i % every].repeat else None for i in range(len(plans))])
    if settings.route_from:
        labels.append(["experts" if now.route else None for now in plans])
    phases = []
    times = [*course.began, course.seconds]
    for row in labels:
        begin = 0
        for name, group in itertools.groupby(row):
            end = begin + len(list(group))
            if name is not None:
                phases.append(Phase(name, (begin, end), (times[begin], times[end])))
            begin = end
    return phases


@dataclass(frozen=True)
class Forecast:
    """The plan of a run. Times are in seconds, sizes in bytes."""

    preset: str
    machine: str
    steps: int
    seconds: float
    """Training time."""
    tokens: int
    epochs: float
    """Of the training text."""
    step_kinds: list[dict[str, Any]]
    phases: list[Phase]
    works: list[tuple[str, int, float]]
    """What takes time beside training steps: name, times, seconds together."""
    total: float
    """Wall time from here on to the end of the run, less what the disk and the report take."""
    checkpoint_bytes: int
    disk_bytes: int
    memory_bytes: float
    memory_of: str
    artifact_bytes: int
    allowed_bytes: int
    limits: list[Limit]

    @property
    def ok(self) -> bool:
        """Whether no binding limit is passed."""
        return not any(limit.over and limit.binding for limit in self.limits)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        value = asdict(self)
        value["phases"] = [phase._asdict() for phase in self.phases]
        value["works"] = [{"name": name, "times": times, "seconds": took} for name, times, took in self.works]
        value["limits"] = [{**limit._asdict(), "over": limit.over} for limit in self.limits]
        return value


def forecast(
    config: RunConfig,
    costs: Costs,
    *,
    machine: str,
    official: bool,
    train_tokens: int,
    artifact_bytes: int,
    build: float,
    disk_free: int,
    rule_seconds: float,
) -> Forecast:
    """Return the plan of a whole run, from step 0.

    `official`: this machine is the one that the rule's `rule_seconds` of training and of scoring are about. `build`:
    seconds that it took to make the engine.
    """
    settings = config.train
    course = walk(settings, costs)
    works = _works(costs, course, build)
    copies = sum(d.save for d in course.due) // settings.keep_every if settings.keep_every else 0
    disk = (2 + copies) * costs.checkpoint_bytes + artifact_bytes  # one in place, and the next one while it is written
    allowed = config.export.budget - config.export.code_bytes
    note = "on 8xH100" if official else "on 8xH100, which this is not: for information"
    asked = course.seconds if settings.seconds is None else settings.seconds
    judged = (costs.plugins or costs.scoring).seconds(cold=True)
    limits = [
        Limit("artifact, predicted", artifact_bytes, allowed, "bytes", True, "what export.budget leaves beside code"),
        Limit(f"memory of the {costs.memory_of}", costs.memory, costs.memory_limit, "bytes", True),
        Limit("disk for checkpoints", disk, disk_free, "bytes", True),
        Limit("training", asked, rule_seconds, "s", False, note),
        Limit("scoring", judged, rule_seconds, "s", False, note),
    ]
    tokens = sum(now.rows * now.seq for now in course.plans)
    kinds = [StepKind.of(now) for now in course.plans]
    return Forecast(
        preset=config.preset,
        machine=machine,
        steps=len(course.plans),
        seconds=course.seconds,
        tokens=tokens,
        epochs=tokens / train_tokens,
        step_kinds=[
            {**kind._asdict(), "name": kind.describe(config), "steps": kinds.count(kind), "seconds": took}
            for kind, took in costs.steps.items()
        ],
        phases=phases(config, course),
        works=works,
        total=course.seconds + math.fsum(took for _, _, took in works),
        checkpoint_bytes=costs.checkpoint_bytes,
        disk_bytes=disk,
        memory_bytes=costs.memory,
        memory_of=costs.memory_of,
        artifact_bytes=artifact_bytes,
        allowed_bytes=allowed,
        limits=limits,
    )


def _works(costs: Costs, course: Course, build: float) -> list[tuple[str, int, float]]:
    """Return what takes time beside training steps: name, times, seconds together.

    A run that ends with stored weights is scored once: its artifact's weights are those in memory.
    """
    follows, once = course.due, course.plans[-1].quantise
    saves = sum(d.save for d in follows) + (not follows[-1].save)
    writes = sum(d.write for d in follows) + (not follows[-1].write)
    evaluations = sum(d.evaluate for d in follows)
    works = [
        ("building", 1, build),
        ("compiling", 1, costs.warm_up),
        ("validation estimate", evaluations, evaluations * costs.estimate.seconds()),
        ("samples", writes, writes * costs.samples),
        ("checkpoint", saves, saves * costs.checkpoint),
        ("scoring, weights in memory", 1 - once, 0.0 if once else costs.scoring.seconds(cold=True)),
        ("export", 1, costs.export),
        ("scoring, artifact", 1, costs.scoring.seconds(cold=once)),
    ]
    return works if costs.plugins is None else [*works, ("scoring, plug-ins", 1, costs.plugins.seconds(cold=True))]
