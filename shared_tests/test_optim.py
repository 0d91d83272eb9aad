"""P3: 20 updates of every optimizer rule on given gradients, backend against backend and oracle. Budget: 5 s."""

import numpy as np
import pytest

from shared_tests import reference
from shared_tests.harness import BACKENDS, call, draw, module, to_device, to_numpy
from shared_tests.tolerances import P3_FLOAT32, P3_FLOAT64, relative_rms

pytestmark = pytest.mark.pair
LIMITS = {"float64": P3_FLOAT64, "float32": P3_FLOAT32}
SETTINGS = {"lr": 3e-3, "decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def twenty_updates(backend: str, dtype: str) -> list[np.ndarray]:
    rule = module(backend, "optim").adamw
    param = to_device(backend, draw("param", 7, 5), dtype)
    m = v = to_device(backend, np.zeros((7, 5)), dtype)
    for step in range(20):
        grad = to_device(backend, draw(f"grad/{step}", 7, 5), dtype)
        bias1, bias2 = 1 - SETTINGS["beta1"] ** (step + 1), 1 - SETTINGS["beta2"] ** (step + 1)
        hyper = (SETTINGS["lr"], SETTINGS["decay"], bias1, bias2, SETTINGS["beta1"], SETTINGS["beta2"], SETTINGS["eps"])
        param, m, v = rule(param, grad, m, v, *hyper)
    return [to_numpy(x) for x in (param, m, v)]


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
