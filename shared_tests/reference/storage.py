"""Storage classes by their definition, in float64: what a tensor is stored as, and what that stands for."""

import numpy as np

from core.config import ModelConfig
from core.model.params import param_table
from core.model.storage import KINDS, STORAGES, Storage, Stored

Array = np.ndarray
LARGEST = {"ternary": 1, "int4": 7, "int5": 15, "int6": 31, "int7": 63, "int8": 127}


def quantise(weight: Array, storage: Storage, deviation: float | None = None) -> Stored:
    """Return codes and scales by dividing and rounding group by group, in float64: the definition, word for word."""
    assert storage in STORAGES and storage.split("/")[0] in KINDS
    if storage == "float16":
        return Stored(weight.astype(np.float32).astype(np.float16), None)
    cls, grouping = storage.split("/")
    rows, columns = weight.shape
    size = columns if grouping == "row" else int(grouping.removesuffix("g"))
    starts = range(0, columns, size)
    codes, scales = np.zeros(weight.shape), np.zeros((rows, len(starts)), np.float16)
    for j, start in enumerate(starts):
        group = weight[:, start : start + size].astype(np.float64)
        if cls == "ternary":
            exact = np.abs(group).mean(1)
        else:
            exact = np.abs(group).max(1) / (448 if cls == "fp8" else LARGEST[cls])
        if deviation is not None:
            spread = deviation * group.std(1) / LARGEST[cls]
            exact = np.where(spread < exact / 4, exact, spread)
        if grouping.endswith("g"):  # a zero row has no logarithm
            exact = 2.0 ** (np.round(32 * np.log2(np.maximum(exact, 2.0**-14))) / 32)
        scales[:, j] = np.maximum(exact.astype(np.float32).astype(np.float16), 2.0**-14)
        ratio = group / scales[:, j : j + 1].astype(np.float64)
        if cls == "fp8":
            codes[:, start : start + size] = to_e4m3(ratio)
        else:
            codes[:, start : start + size] = np.clip(np.round(ratio), -LARGEST[cls], LARGEST[cls])
    return Stored(codes.astype(np.float32 if cls == "fp8" else np.int8), scales)


def to_e4m3(x: Array) -> Array:
    """Round to the nearest of all 253 finite e4m3 values, a tie to the even code: by looking at every one of them."""
    grid = [m * 2.0**-9 for m in range(8)]
    grid += [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
    values = np.array(grid)
    size = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(values, size)
    below = np.maximum(above - 1, 0)
    low, high = size - values[below], values[above] - size
    nearest = np.where((low < high) | ((low == high) & (below % 2 == 0)), below, above)
    return np.copysign(values[nearest], x)


def stored_model(config: ModelConfig, weights: dict[str, Array]) -> dict[str, Stored]:
    """Return every tensor of a model as the artifact keeps it."""
    return {name: quantise(weights[name], row.storage, row.deviation) for name, row in param_table(config).items()}


def decode(stored: Stored, storage: Storage) -> Array:
    """Return code times scale, value by value."""
    if stored.scales is None:
        return stored.codes.astype(np.float64)
    rows, columns = stored.codes.shape
    size = columns if storage.endswith("row") else int(storage.split("/")[1].removesuffix("g"))
    out = np.empty((rows, columns))
    for column in range(columns):
        out[:, column] = stored.codes[:, column] * stored.scales[:, column // size].astype(np.float64)
    return out


def stored_weights(config: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]:
    """Return the weights that a quantised forward pass uses."""
    table = param_table(config)
    return {name: decode(value, table[name].storage) for name, value in stored_model(config, weights).items()}
