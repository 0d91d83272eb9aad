"""What is measured of a device, in order of value: items, each a process with a time limit. Standard library only."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One part of a check."""

    name: str
    call: str
    """`module.function` in this folder; it gets the Child and `given`."""
    cap: float = 60.0
    """Seconds of its turn, after which it is ended."""
    given: dict[str, Any] = field(default_factory=dict)
    gpu_only: bool = False
    """It says nothing without a GPU."""
    prepares: bool = False
    """It starts early, compiles beside the others, and waits for its turn."""
    after: tuple[str, ...] = ()
    """What must have ended before it starts to prepare."""
    environment: dict[str, str] = field(default_factory=dict)
    cpu: dict[str, str] = field(default_factory=dict)
    """More environment, where the check runs on the CPU."""


def speed(preset: str, micro: int, *after: str, **environment: str) -> Item:
    """Return the item that times a step of a preset."""
    name = " ".join([f"speed {preset}, {micro} rows", *(f"{key}={value}" for key, value in environment.items())])
    given = {"preset": preset, "micro": micro}
    late = bool(after)  # without a GPU the first ones show that it runs
    return Item(name, "speed.run", 70, given, gpu_only=late, prepares=True, after=after, environment=environment)


MIXED = {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"}
"""torch 2.11's fused reductions may take too many registers (pytorch issue 179423): the step is timed without them."""
FIRST = ("speed skc_8xh100, 32 rows", "speed baseline, 32 rows")
CUDA = (
    Item("environment", "facts.run", 40),
    Item("smoke", "smoke.run", 60),
    Item("ceilings", "ceilings.run", 40),
    Item("kernels", "kernels.run", 80, cpu={"TRITON_INTERPRET": "1"}),
    Item("attention", "attention.run", 60),
    Item("quantiser", "quantiser.run", 40, prepares=True),
    Item("ops", "parity.ops", 60),
    Item("models", "parity.models", 80, prepares=True),
    speed("skc_8xh100", 32),
    speed("baseline", 32),
    speed("ternary_74m", 32),
    speed("skc_8xh100", 32, FIRST[1], **MIXED),
    speed("baseline", 32, FIRST[0], **MIXED),
    Item("plain torch", "plain.run", 60, prepares=True, after=FIRST[:1]),
    Item("precision", "precision.run", 80),
    Item("compiled baseline", "parity.compiled", 40, {"preset": "baseline"}, True, True, ("models",)),
    Item("compiled skc_8xh100", "parity.compiled", 40, {"preset": "skc_8xh100"}, True, True, ("models",)),
    speed("skc_8xh100", 64, *FIRST),
    speed("skc_8xh100", 8, *FIRST),
    speed("ternary_74m", 64, *FIRST),
)
"""gpu_check. The figures that are wanted most come first."""
MLX = (
    Item("environment", "facts.run", 20),
    Item("smoke", "smoke.run", 60),
    Item("ops", "parity.ops", 120),
    Item("models", "parity.models", 180, prepares=True),
    Item("speed tiny", "speed.run", 120, {"preset": "tiny", "micro": None}),
    Item("speed skc_mac", "speed.run", 120, {"preset": "skc_mac", "micro": None}),
    Item("speed baseline", "speed.run", 180, {"preset": "baseline", "micro": 8}, gpu_only=True),
    Item("precision", "precision.run", 180),
    Item("compiled baseline", "parity.compiled", 60, {"preset": "baseline"}, True, True),
    Item("compiled skc_8xh100", "parity.compiled", 60, {"preset": "skc_8xh100"}, True, True),
)
"""mac_check."""
PLANS = {"cuda": CUDA, "mlx": MLX}
