"""Twenty updates of each optimizer rule on given gradients."""

import numpy as np

from core.config import POLAR_EXPRESS, TrainConfig
from shared_tests.support.harness import draw, module, to_device, to_numpy

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


MUON = {
    "plain": TrainConfig(),
    "rows": TrainConfig(muon_rows=True, muon_iterations=3),
    "rms": TrainConfig(muon_scale="rms", muon_coefficients=(2.0, -1.5, 0.5)),
    "polar express": TrainConfig(muon_coefficients=POLAR_EXPRESS),
}

SHAPES = [(6, 6), (9, 4), (4, 9), (1, 5)]


def twenty_of_muon(backend: str, dtype: str, shape: tuple[int, int], settings: TrainConfig) -> list[np.ndarray]:
    """Return (param, m) of a stack of three matrices; the gradient of the second is zero at every third step."""
    rule = module(backend, "optim").muon
    param = to_device(backend, draw("param", 3, *shape), dtype)
    m = to_device(backend, np.zeros((3, *shape)), dtype)
    for step in range(20):
        param, m = rule(param, to_device(backend, grads_at(step, shape), dtype), m, 0.02, 0.1, 0.9, settings)
    return [to_numpy(param), to_numpy(m)]


def grads_at(step: int, shape: tuple[int, int]) -> np.ndarray:
    grad = draw(f"grad/{step}", 3, *shape)
    grad[1] *= step % 3 != 0
    return grad
