"""P3: 20 updates of every optimizer rule on given gradients, backend against backend and oracle. Budget: 5 s."""

import numpy as np
import pytest

from core.check.tolerances import P3_FLOAT32, P3_FLOAT64, relative_rms
from core.config import POLAR_EXPRESS, ConfigError, TrainConfig
from core.training import schedule
from shared_tests.reference import optim as reference
from shared_tests.support.harness import BACKENDS, call, draw, module
from shared_tests.support.optimizer_cases import MUON, SETTINGS, SHAPES, grads_at, twenty_of_muon, twenty_updates

pytestmark = pytest.mark.pair
LIMITS = {"float64": P3_FLOAT64, "float32": P3_FLOAT32}


@pytest.mark.parametrize("dtype", LIMITS)
def test_adamw_agrees_over_twenty_updates(dtype: str) -> None:
    mine, theirs = (twenty_updates(b, dtype) for b in BACKENDS)
    oracle = reference.adamw(draw("param", 7, 5), [draw(f"grad/{s}", 7, 5) for s in range(20)], **SETTINGS)
    for a, b, c in zip(mine, theirs, oracle, strict=True):
        assert relative_rms(a, b) <= LIMITS[dtype]
        assert relative_rms(a, c) <= LIMITS[dtype] and relative_rms(b, c) <= LIMITS[dtype]


def test_adamw_is_torchs_adamw() -> None:
    import torch

    param = torch.nn.Parameter(torch.tensor(draw("param", 7, 5)))
    rule = torch.optim.AdamW(
        [param],
        lr=SETTINGS["lr"],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["eps"],
        weight_decay=SETTINGS["decay"],
    )
    for step in range(20):
        param.grad = torch.tensor(draw(f"grad/{step}", 7, 5))
        rule.step()
    assert relative_rms(twenty_updates("cuda", "float64")[0], param.detach().numpy()) <= P3_FLOAT64


@pytest.mark.parametrize("name", MUON)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS)
def test_muon_agrees_over_twenty_updates(dtype: str, shape: tuple[int, int], name: str) -> None:
    settings = MUON[name]
    mine, theirs = (twenty_of_muon(b, dtype, shape, settings) for b in BACKENDS)
    rows = [
        reference.muon(start, [grads_at(s, shape)[i] for s in range(20)], 0.02, 0.1, 0.9, settings)
        for i, start in enumerate(draw("param", 3, *shape))
    ]
    oracle = [np.stack(part) for part in zip(*rows, strict=True)]
    for a, b, c in zip(mine, theirs, oracle, strict=True):
        assert relative_rms(a, b) <= LIMITS[dtype]
        assert relative_rms(a, c) <= LIMITS[dtype] and relative_rms(b, c) <= LIMITS[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_newton_schulz_brings_singular_values_near_one(backend: str) -> None:
    settings = TrainConfig()
    for shape in ((64, 64), (96, 32), (32, 96)):
        (got,) = call(
            backend,
            lambda x: module(backend, "optim").newton_schulz(x, settings.muon_iterations, settings.muon_coefficients),
            (draw(f"ns/{shape}", 2, *shape),),
            "float32",
        )
        values = np.linalg.svd(got, compute_uv=False)
        assert values.max() < 1.3 and np.median(values) > 0.65  # the smallest of a square matrix may lag behind


BOUNDS = {"jordan": (5, TrainConfig().muon_coefficients, 0.682, 1.202), "polar": (5, POLAR_EXPRESS, 0.859, 1.141)}
"""What five iterations make of singular values of 0.003 to 1: iterations, coefficients, least, largest."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOUNDS)
def test_newton_schulz_brings_every_singular_value_of_a_range_near_one(name: str, backend: str) -> None:
    """Of matrices of Frobenius norm 1 (a thousandth, too: 0.86 by Polar Express, 0.47 by one polynomial)."""
    iterations, coefficients, least, largest = BOUNDS[name]
    small = np.concatenate([[1e-3], np.geomspace(3e-3, np.sqrt(0.5), 4000)])
    given = 7 * np.stack([np.diag(pair) for pair in zip(small, np.sqrt(1 - small**2), strict=True)])
    rule = module(backend, "optim").newton_schulz
    (found,) = call(backend, rule, (given, iterations, coefficients), "float64")
    values = np.diagonal(found, axis1=1, axis2=2)
    assert np.abs(found[:, [0, 1], [1, 0]]).max() < 1e-12
    assert least - 1e-3 <= values[1:].min() <= least + 1e-3 and largest - 1e-3 <= values[1:].max() <= largest + 1e-3
    assert values[0, 0] == pytest.approx({"jordan": 0.47, "polar": 0.859}[name], abs=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_polar_express_would_not_do(backend: str) -> None:
    """Three of its five iterations: this is why the settings refuse it."""
    given = np.stack([np.diag([s, np.sqrt(1 - s**2)]) for s in np.geomspace(3e-3, 0.7, 1000)])
    (found,) = call(backend, module(backend, "optim").newton_schulz, (given, 3, POLAR_EXPRESS[:9]), "float64")
    values = np.diagonal(found, axis1=1, axis2=2)
    assert values.min() < 0.2 and values.max() > 1.8


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"muon_coefficients": POLAR_EXPRESS, "muon_iterations": 3},
            "15 numbers for train.muon_iterations=3: expected",
        ),
        ({"muon_coefficients": POLAR_EXPRESS[:9]}, "9 numbers for train.muon_iterations=5"),
        ({"muon_coefficients": POLAR_EXPRESS[:4]}, "4 numbers"),
        ({"muon_coefficients": POLAR_EXPRESS[:9], "muon_iterations": 3}, "a part of a longer list will not do"),
        ({"muon_coefficients": POLAR_EXPRESS[:3]}, "a part of a longer list will not do"),
        ({"muon_coefficients": ()}, "0 numbers"),
        ({"muon_coefficients": POLAR_EXPRESS[:1], "muon_iterations": 0}, "1 numbers"),
    ],
)
def test_coefficients_of_another_number_of_iterations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig(**changes)
    assert "\n" not in str(error.value)
    own = (*TrainConfig().muon_coefficients, 3.0, -4.0, 2.0)
    assert TrainConfig(muon_coefficients=own, muon_iterations=2), "two triples may be made for two"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_muon_leaves_a_matrix_without_a_gradient_alone(bad: float, backend: str) -> None:
    param, m, grad = draw("param", 2, 4, 3), draw("m", 2, 4, 3), draw("grad", 2, 4, 3)
    grad[1] = bad
    rule = module(backend, "optim").muon
    new, buffer = call(backend, rule, (param, grad, m, 0.1, 0.5, 0.9, TrainConfig()), "float64")
    assert np.array_equal(new[1], param[1]) and np.array_equal(buffer[1], m[1])
    assert not np.array_equal(new[0], param[0]) and np.isfinite(new).all()


def test_momentum_warms_up_by_the_plan() -> None:
    config = TrainConfig(muon_momentum_steps=10)
    values = [schedule.plan(step, 0.5, config).momentum for step in (0, 5, 10, 500)]
    assert values == pytest.approx([0.85, 0.9, 0.95, 0.95], abs=1e-15)
    assert schedule.plan(0, 0.5, TrainConfig(muon_momentum_steps=0)).momentum == pytest.approx(0.95)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping(backend: str) -> None:
    optim = module(backend, "optim")
    grads = [draw("a", 4, 3), draw("b", 9)]
    total = float(np.sqrt(sum((g**2).sum() for g in grads)))

    def norm(*arrays):
        return optim.global_norm(arrays)

    (measured,) = call(backend, norm, tuple(grads), "float64")
    assert measured == pytest.approx(total, rel=1e-12)
    for limit, expected in ((total / 2, 0.5), (2 * total, 1.0), (None, 1.0)):
        (scale,) = call(backend, optim.clip_scale, (measured.reshape(()), limit), "float64")
        assert scale == pytest.approx(expected, rel=1e-6)
