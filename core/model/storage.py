"""Storage classes: how a tensor is kept in the artifact, and so what a quantisation-aware forward pass uses.

Every class but float16 keeps codes and float16 scales; a scale belongs to a group of a row, or to the whole row.
The engines quantise (`backends/<name>/storage.py`), `core/export` packs, `decode` here is what a reader computes.
"""

import itertools
import math
from typing import Literal, NamedTuple, get_args

import numpy as np

Storage = Literal[
    "float16",
    "ternary/64", "ternary/128", "ternary/64g", "ternary/128g",
    "int8/row", "int8/64", "int8/128",
    "int7/row", "int7/64", "int7/128",
    "int6/row", "int6/64", "int6/128",
    "int5/row", "int5/64", "int5/128",
    "int4/row", "int4/64", "int4/128",
    "fp8/row",
]  # fmt: skip
"""Class and, behind the slash, how many values along the input share a scale; g: the scale is on a grid of ratios."""
STORAGES: tuple[Storage, ...] = get_args(Storage)
Kind = Literal["float16", "ternary", "int8", "int7", "int6", "int5", "int4", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGEST = {"ternary": 1, "int4": 7, "int5": 15, "int6": 31, "int7": 63, "int8": 127, "fp8": 448}
"""Largest code of a class: the scale of an int or fp8 group maps its largest weight to it, or so many deviations."""
BITS = {"float16": 16.0, "ternary": 1.6, "int4": 4.0, "int5": 5.0, "int6": 6.0, "int7": 7.0, "int8": 8.0, "fp8": 8.0}
"""Bits per value before compression, scales not counted: of five ternary codes to a byte, 3^5 = 243."""
SCALE_FLOOR = 2.0**-14
"""Smallest scale: float16's smallest normal number."""


def _ratios() -> tuple[tuple[int, ...], tuple[int, ...]]:
    # Whole numbers alone: a logarithm's last bit differs between platforms, and with it codes would.
    powers = []
    for j in range(65):  # floor(2^24 * 2^(j / 64)): six square roots of 2^(24 * 64 + j)
        power = 1 << (24 * 64 + j)
        for _ in range(6):
            power = math.isqrt(power)
        powers.append(power)
    scales = [(power + (1 << 13) >> 14) << 13 for power in powers[::2]]  # rounded as float16 is, in float32's digits
    steps = [after - before for before, after in itertools.pairwise(scales)]
    return tuple((power >> 1) + 1 - (1 << 23) for power in powers[1::2]), tuple(steps)


RATIOS = _ratios()
"""The scales float16(2^(n / 32)) of one octave, in the 23 digits that float32 keeps behind the leading one: where each
next scale begins to be the nearest, by ratio, and by how much it is larger than the one before."""


class Stored(NamedTuple):
    """A tensor as the artifact keeps it."""

    codes: np.ndarray
    """float16 values; or (rows, columns) int8 codes; for fp8 float32 that e4m3 can hold."""
    scales: np.ndarray | None
    """(rows, groups) float16; None for float16 tensors."""


def storage_class(storage: Storage) -> Kind:
    """Return the class of a storage, without its grouping."""
    return storage.partition("/")[0]  # pyright: ignore[reportReturnType]


def gridded(storage: Storage) -> bool:
    """Return whether a storage rounds to a grid of equal steps."""
    return storage_class(storage).startswith("int")


def by_ratios(storage: Storage) -> bool:
    """Return whether the scales of a storage are on the grid of RATIOS."""
    return storage.endswith("g")


def group_size(storage: Storage, columns: int) -> int:
    """Return how many values share a scale in a matrix of `columns` columns; the last group may hold fewer."""
    grouping = storage.partition("/")[2].removesuffix("g")
    return columns if grouping in ("", "row") else int(grouping)


def scales_shape(storage: Storage, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (rows, groups) of the scales of a tensor, None for float16."""
    if storage == "float16":
        return None
    rows, columns = shape
    return rows, -(-columns // group_size(storage, columns))


def group_counts(columns: int, size: int) -> list[int]:
    """Return how many real values each group of a row holds: padding of the last group does not count."""
    return [min(size, columns - start) for start in range(0, columns, size)]


def raw_bits(storage: Storage, shape: tuple[int, ...]) -> float:
    """Return the bits of a tensor in the artifact before compression, scales included."""
    scales = scales_shape(storage, shape)
    return math.prod(shape) * BITS[storage_class(storage)] + (16 * math.prod(scales) if scales else 0)


def decode(stored: Stored, storage: Storage) -> np.ndarray:
    """Return the float32 weights that `stored` stands for: exact, since code times scale fits float32."""
    if stored.scales is None:
        return stored.codes.astype(np.float32)
    weight, size = stored.codes.astype(np.float32), group_size(storage, stored.codes.shape[1])
    for group, scale in enumerate(stored.scales.astype(np.float32).T):
        weight[:, group * size : (group + 1) * size] *= scale[:, None]
    return weight


def scales_of(weight: np.ndarray, storage: Storage, deviation: float | None = None) -> np.ndarray:
    """Return the float16 scales (rows, groups) of a weight (rows, columns), bit for bit those of both backends.

    With `deviation` = k the largest code of an int class stands for k standard deviations of a group, without it for
    the group's largest weight. Not for float16.
    """
    columns, number = weight.shape[1], weight.dtype.type
    size, largest = group_size(storage, columns), LARGEST[storage_class(storage)]
    counts = np.array(group_counts(columns, size), weight.dtype)[:, None]
    groups = _grouped(weight, size)
    with np.errstate(over="ignore", invalid="ignore"):
        if storage_class(storage) == "ternary":
            exact = (_sum_by_halves(np.abs(groups)) * (1 / counts)).astype(np.float32)
            exact = _on_ratios(exact) if by_ratios(storage) else exact
        else:
            exact = np.abs(groups).max(2, keepdims=True) * number(1 / largest)
        if deviation is not None:
            mean = _sum_by_halves(groups) / counts
            away = _grouped((groups - mean).reshape(len(weight), -1)[:, :columns], size)
            spread = np.sqrt(_sum_by_halves(away * away) / counts) * number(deviation / largest)
            exact = np.where(4 * spread < exact, exact, spread)
        return np.maximum(exact.astype(np.float32).astype(np.float16), np.float16(SCALE_FLOOR))[..., 0]


def _grouped(values: np.ndarray, size: int) -> np.ndarray:
    """Return (rows, columns) as (rows, groups, size), the last group of a row filled with zeros."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % size))).reshape(len(values), -1, size)


def _sum_by_halves(values: np.ndarray) -> np.ndarray:
    """Return the sum over the last axis, by adding its second half to its first; zeros fill it to a power of two."""
    short = (1 << (values.shape[-1] - 1).bit_length()) - values.shape[-1]
    values = np.pad(values, ((0, 0), (0, 0), (0, short)))
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values


def _on_ratios(scale: np.ndarray) -> np.ndarray:
    """Return float32 scales on the grid of RATIOS, the nearest by ratio; what is not finite stays so."""
    bits = np.minimum(scale.view(np.int32) & 0x7FFFFFFF, 0x7F800000)
    mantissa, (starts, steps) = bits & 0x7FFFFF, np.array(RATIOS, np.int32)
    return (bits - mantissa + np.where(mantissa >= starts, steps, 0).sum(-1, np.int32, keepdims=True)).view(np.float32)
