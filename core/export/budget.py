"""How large an artifact will be, before there are weights: what `skc info` says about a model and its alternatives.

The figures stand for trained weights that are roughly Gaussian in each row; docs/log.md compares them with artifacts.
"""

import math
from statistics import NormalDist

from core.config import ModelConfig, changed
from core.export.codecs import together, values_in
from core.export.coder import lanes
from core.export.fit import Fit, fit_factor
from core.export.symbols import E4M3
from core.model.params import param_table
from core.model.storage import LARGEST, Storage, by_ratios, gridded, group_size, scales_shape, storage_class

HEADER = 700
"""Bytes of a header, about."""
TABLES_BYTES = 45
"""Bytes of the tables of a tensor, or of a role of vectors, beside those of its codes."""
SCALE_BITS, ROW_SCALE_BITS, RATIO_BITS = 9.3, 10.5, 4.4
"""Bits of a scale: of a group, of a row, and on the grid of ratios, where rows differ in size by a fifth."""
FLOAT16_BITS = 13.5
TABLES: tuple[Storage, ...] = ("fp8/row", "int8/row", "int6/row")
"""What else the tables could be stored as, for comparison."""


def compressed_bits(storage: Storage, columns: int, deviation: float | None = None) -> float:
    """Return the bits per value of a tensor with rows of `columns` in an artifact, scales and tables not counted.

    They are the entropy of a Gaussian on the storage's grid, whose scale is the mean size of its values (ternary),
    `deviation`, or the largest of n values: that lies at the quantile 1 - 1 / (2n + 1) of their sizes.
    """
    cls, count = storage_class(storage), min(group_size(storage, columns), columns)
    largest = NormalDist().inv_cdf(1 - 0.25 / (count + 0.5))
    if cls == "float16":
        return FLOAT16_BITS
    if cls == "ternary":
        return gaussian_bits(math.sqrt(2 / math.pi), 1)
    if cls == "fp8":
        return _bits([float(a + b) / 2 * largest / LARGEST[cls] for a, b in zip(E4M3, E4M3[1:], strict=False)])
    return gaussian_bits((deviation or largest) / LARGEST[cls], LARGEST[cls])


def gaussian_bits(step: float, largest: int | None = None) -> float:
    """Return the entropy in bits of a Gaussian of deviation 1, rounded to multiples of `step` up to `largest`."""
    return _bits([(code + 0.5) * step for code in range(largest or int(9 / step) + 2)])


def _bits(ends: list[float]) -> float:
    """Return the entropy of a Gaussian in cells of which those from 0 up end at `ends`, and the last one nowhere."""
    below = [NormalDist().cdf(end) for end in ends]
    shares = [2 * below[0] - 1, *(2 * [high - low for low, high in zip(below, [*below[1:], 1.0], strict=True)])]
    return -sum(share * math.log2(share) for share in shares if share > 0)


def predicted_bytes(model: ModelConfig) -> int:
    """Return the bytes of the artifact of a trained `model`, without code."""
    table = param_table(model)
    bits = 8.0 * (HEADER + 4 * lanes(values_in(table)) + TABLES_BYTES * len(together(table)))
    for name, row in table.items():
        part = row.size * compressed_bits(row.storage, row.shape[-1], row.deviation)
        if scales := scales_shape(row.storage, row.shape):
            each = RATIO_BITS if by_ratios(row.storage) else ROW_SCALE_BITS if scales[1] == 1 else SCALE_BITS
            levels = 2 * LARGEST[storage_class(row.storage)] if row.deviation is None else 9 * row.deviation
            part += each * math.prod(scales) + 8 * min(levels, 255)
        shares = model.engram.keep if name == "engram.table" and model.engram.keep else (1.0,)
        bits += part * sum(shares) / len(shares)  # a pruned row is all zeros, and those are a class of their own
    return round(bits / 8)


def fitted_steps(model: ModelConfig, room: int, slack: int) -> Fit:
    """Return the factor on the steps of model.deviations that export.fit is predicted to find; FitError: none."""
    given = {name: k for name, k in vars(model.deviations).items() if k is not None}

    def size(factor: float) -> int:
        return predicted_bytes(changed(model, {f"deviations.{name}": factor * k for name, k in given.items()}))

    return fit_factor(size, room, slack)


def with_tables(model: ModelConfig) -> dict[Storage, int]:
    """Return the predicted bytes for each storage in TABLES of what embedding.storage stores."""
    plain = changed(model, {"deviations.table": None})  # what has no grid has no deviations
    models = {storage: model if gridded(storage) else plain for storage in TABLES}
    return {name: predicted_bytes(changed(models[name], {"embedding.storage": name})) for name in TABLES}
