"""How long a training step takes in each compute type: what `skc doctor` says, kept as figures."""

from core.check.dtypes import step_milliseconds
from shared_tests.device.child import Child


def run(child: Child) -> None:
    """Time the types in turns."""
    with child.alone():
        times = step_milliseconds(child.gpu)
    for dtype, milliseconds in times.items():
        child.figure(f"a training step in {dtype}", milliseconds, "ms")
    child.text("fastest", min(times, key=lambda dtype: times[dtype]))
