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
    optional: bool = False
    """It need not be reached."""
    environment: dict[str, str] = field(default_factory=dict)
    cpu: dict[str, str] = field(default_factory=dict)
    """More environment, where the check runs on the CPU."""


NOT_MIXED = {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"}
"""torch 2.11's fused reductions may take too many registers (pytorch issue 179423): steps are timed without, too."""


def speed(preset: str, micro: int, *after: str, optional: bool = False, mixed: bool = True) -> Item:
    """Return the item that times a step of a preset, so many rows at a time; not `mixed`: with NOT_MIXED."""
    name = f"speed {preset}, {micro} rows" + ("" if mixed else ", no mix-order reductions")
    given = {"preset": preset, "micro": micro}
    late = bool(after)  # without a GPU the first ones show that it runs
    return Item(name, "speed.run", 70, given, late, True, after, optional, {} if mixed else NOT_MIXED)


FIRST = ("speed skc_8xh100, 32 rows", "speed baseline, 32 rows")
"""What compiles together must find room together: on 80 GB these two and ternary_74m, then what waits for them."""
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
    speed("skc_8xh100", 32, FIRST[1], mixed=False),
    speed("baseline", 32, FIRST[0], mixed=False),
    Item("plain torch", "plain.run", 60, prepares=True, after=FIRST[:1]),
    Item("precision", "precision.run", 80),
    Item("compiled baseline", "parity.compiled", 40, {"preset": "baseline"}, True, True, ("models",)),
    Item("compiled skc_8xh100", "parity.compiled", 40, {"preset": "skc_8xh100"}, True, True, ("models",)),
    speed("skc_8xh100", 64, *FIRST, "plain torch", optional=True),
    speed("skc_8xh100", 8, *FIRST, "plain torch", optional=True),
    speed("ternary_74m", 64, "speed skc_8xh100, 64 rows", optional=True),
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
    Item("kernels", "mlx_kernels.run", 120),
    Item("precision", "precision.run", 180),
    Item("compiled baseline", "parity.compiled", 60, {"preset": "baseline"}, True, True),
    Item("compiled skc_8xh100", "parity.compiled", 60, {"preset": "skc_8xh100"}, True, True),
)
"""mac_check."""
PLANS = {"cuda": CUDA, "mlx": MLX}
