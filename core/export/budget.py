"""How large an artifact will be, before there are weights: what `skc info` says about a model and its alternatives.

The figures stand for trained weights that are roughly Gaussian in each row; docs/log.md compares them with artifacts.
"""

import itertools
import math
from statistics import NormalDist

from core.config import ModelConfig, changed
from core.model.params import param_table
from core.model.storage import BITS, LARGEST, Storage, by_ratios, gridded, group_size, scales_shape, storage_class

HEADER = 1500
"""Bytes of a header beside its list of tensors, and per tensor, roughly."""
HEADER_PER_TENSOR = 55
TRIT_BITS = 1.595
SCALE_BITS = 10.0
RATIO_BITS = 5.5
FP8_BITS = 6.5
FLOAT16_BITS = 13.5
TABLES: tuple[Storage, ...] = ("fp8/row", "int8/row", "int6/row")
"""What else the tables could be stored as, for comparison."""


def compressed_bits(storage: Storage, columns: int, deviation: float | None = None) -> float:
    """Return the bits per value of a tensor with rows of `columns` after compression, its scales not counted.

    Integers: the entropy of a Gaussian in steps of largest / LARGEST, where the largest of n values lies at the
    quantile 1 - 1 / (2n + 1) of their sizes, or is `deviation`; the entropy coder adds half a percent (int4: 2, int5, a
    byte a code: 9).
    """
    cls = storage_class(storage)
    if cls in ("float16", "ternary", "fp8"):
        return {"float16": FLOAT16_BITS, "ternary": TRIT_BITS, "fp8": FP8_BITS}[cls]
    count = min(group_size(storage, columns), columns)
    largest = NormalDist().inv_cdf(1 - 0.25 / (count + 0.5))
    entropy = math.log2(math.sqrt(2 * math.pi * math.e) * LARGEST[cls] / largest)
    if deviation is not None:  # steps that are not small beside the deviation
        entropy = gaussian_bits(deviation / LARGEST[cls])
    return min({"int4": 1.02, "int5": 1.09}.get(cls, 1.005) * entropy, BITS[cls])


def gaussian_bits(step: float) -> float:
    """Return the entropy, in bits, of a Gaussian of deviation 1 that is rounded to multiples of `step`."""
    ends = [NormalDist().cdf((0.5 - code) * step) for code in range(int(9 / step) + 2)]  # of codes from 0 down
    zero, others = 2 * ends[0] - 1, [high - low for high, low in itertools.pairwise(ends[1:])]
    return -sum(share * math.log2(share) for share in (zero, *others, *others) if share)


def predicted_bytes(model: ModelConfig) -> int:
    """Return the bytes of the artifact of a trained `model`, without code."""
    bits = 0.0
    table = param_table(model)
    for name, row in table.items():
        scale_bits = RATIO_BITS if by_ratios(row.storage) else SCALE_BITS
        scales = scale_bits * math.prod(scales_shape(row.storage, row.shape) or (0,))
        part = math.prod(row.shape) * compressed_bits(row.storage, row.shape[-1], row.deviation) + scales
        shares = model.engram.keep if name == "engram.table" and model.engram.keep else (1.0,)
        bits += part * sum(shares) / len(shares)  # a pruned row is all zeros, which compress to almost nothing
    return round(bits / 8) + HEADER + HEADER_PER_TENSOR * len(table)


def with_tables(model: ModelConfig) -> dict[Storage, int]:
    """Return the predicted bytes for each storage in TABLES of what embedding.storage stores."""
    plain = changed(model, {"deviations.table": None})  # what has no grid has no deviations
    models = {storage: model if gridded(storage) else plain for storage in TABLES}
    return {name: predicted_bytes(changed(models[name], {"embedding.storage": name})) for name in TABLES}
