"""How many launches a training step of the MLX engine takes: a change that doubles them fails without a Mac.
Budget: 3 s."""

from collections.abc import Callable

import mlx.core as mx
import pytest

from core import presets
from shared_tests.support import launches

CEILINGS = {
    "debug": 254, "tiny": 640, "ablate_float": 645, "ablate": 750, "baseline": 1_783, "ternary_74m": 2_109,
    "skc_ablate": 1_100, "delta_ablate": 1_400,
    "skc_mac": 2_200, "skc_600": 2_760, "skc_8xh100": 2_566, "skc_8xh100_int6": 2_534, "skc_proxy": 2_017,
    "skc_1609_mac": 2_671, "skc_1609": 3_703,
    "pr401_mac": 1_651, "pr550_mac": 1_559, "pr1619_mac": 2_301, "pr1394_mac": 2_284, "pr1855_mac": 2_799,
    "pr401": 3_754, "pr550": 3_661, "pr1619": 4_978, "pr1394": 5_151, "pr1855": 5_445,
}  # fmt: skip
"""Launches of one micro-batch's step at most, its quantisers and its update included.

Attention counts in blocks, as it is trained: Metal composes MLX's own when gradients are traced."""


LARGE = (
    "ternary_74m",
    "skc_600",
    "skc_8xh100",
    "skc_8xh100_int6",
    "skc_proxy",
    "skc_1609",
    "pr401",
    "pr550",
    "pr1619",
    "pr1394",
    "pr1855",
)
"""Their arrays alone take seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LARGE else name for name in presets.PRESETS]
)
def test_a_step_takes_no_more_launches(name: str) -> None:
    counted = launches.step(presets.get(name).config)["step"]
    assert counted.total() <= CEILINGS[name], counted


def test_what_is_counted() -> None:
    """Views are nothing, what fuses is one, what is joined is one for each input, a stand-in is what it says."""
    x, y = mx.ones((4, 6)), mx.ones((4, 6))

    def counted(function: Callable, *arrays: mx.array) -> int:
        return launches.count([mx.compile(function)(*arrays)], list(arrays)).total()

    assert counted(lambda x: mx.swapaxes(x.reshape(2, 12), 0, 1)[1:3], x) == 0
    assert counted(lambda x, y: x * y + mx.exp(x), x, y) == 1
    assert counted(lambda x, y: mx.concatenate([x, y, x]), x, y) == 3
    assert counted(lambda x, y: mx.sum(x @ y.T), x, y) == 2
    with launches.on_metal():
        assert counted(lambda x: mx.fast.rms_norm(x, None, 1e-5), x) == 1
        assert counted(mx.grad(lambda x: mx.fast.rms_norm(x, None, 1e-5).sum()), x) == 2
    assert counted(lambda x: mx.fast.rms_norm(x, None, 1e-5), x) > 1, "composed on a CPU"
