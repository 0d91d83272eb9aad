"""Storage classes: how a tensor is kept in the artifact, and so what a quantisation-aware forward pass uses.

Every class but float16 keeps codes and float16 scales; a scale belongs to a group of a row, or to the whole row.
The engines quantise (`backends/<name>/storage.py`), `core/export` packs, `decode` here is what a reader computes.
"""

import math
from typing import Literal, NamedTuple, get_args

import numpy as np

Storage = Literal[
    "float16",
    "ternary/64", "ternary/128",
    "int8/row", "int8/64", "int8/128",
    "int6/row", "int6/64", "int6/128",
    "int4/row", "int4/64", "int4/128",
    "fp8/row",
]  # fmt: skip
"""Class and, behind the slash, how many values along the input share a scale."""
STORAGES: tuple[Storage, ...] = get_args(Storage)
Kind = Literal["float16", "ternary", "int8", "int6", "int4", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGEST = {"ternary": 1, "int4": 7, "int6": 31, "int8": 127, "fp8": 448}
"""Largest code of a class: the scale of an int or fp8 group maps its largest weight to it."""
# Five ternary codes fit a byte, 3^5 = 243: 1.6 bits each.
BITS = {"float16": 16.0, "ternary": 1.6, "int4": 4.0, "int6": 6.0, "int8": 8.0, "fp8": 8.0}
"""Bits per value in the artifact before compression, scales not counted."""
SCALE_FLOOR = 2.0**-14
"""Smallest scale: float16's smallest normal number."""


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
    """Return whether a storage rounds to a grid of equal steps that reaches to the largest weight of a group."""
    return storage_class(storage).startswith("int")


def group_size(storage: Storage, columns: int) -> int:
    """Return how many values share a scale in a matrix of `columns` columns; the last group may hold fewer."""
    grouping = storage.partition("/")[2]
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
