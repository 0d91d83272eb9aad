"""How large an artifact will be, before there are weights: what `skc info` says about a model and its alternatives.

The figures stand for trained weights that are roughly Gaussian in each row; docs/log.md compares them with artifacts.
"""

import ast
import functools
import math
from pathlib import Path
from statistics import NormalDist

from core import ROOT
from core.audit import claims
from core.config import ModelConfig, changed
from core.files import read_file
from core.model.params import param_table
from core.model.storage import BITS, LARGEST, Storage, group_size, scales_shape, storage_class

HEADER = 1500
"""Bytes of a header beside its list of tensors, and per tensor, roughly."""
HEADER_PER_TENSOR = 55
TRIT_BITS = 1.595
SCALE_BITS = 10.0
FP8_BITS = 6.5
FLOAT16_BITS = 13.5
EVALUATION = ("core.audit.watch.witness", "core.audit.watch.evaluation")
"""What an audited evaluation begins with, beside its backend."""
ENGINES = {"mlx": ("backends.mlx.blas", "backends.mlx.engine"), "cuda": ("backends.cuda.engine",)}
TABLES: tuple[Storage, ...] = ("fp8/row", "int8/row", "int6/row")
"""What else the tables could be stored as, for comparison."""


def compressed_bits(storage: Storage, columns: int) -> float:
    """Return the bits per value of a tensor with rows of `columns` after compression, its scales not counted.

    Integers: the entropy of a Gaussian in steps of largest / LARGEST, where the largest of n values lies at the
    quantile 1 - 1 / (2n + 1) of their sizes; the entropy coder adds half a percent (int4: 2).
    """
    cls = storage_class(storage)
    if cls in ("float16", "ternary", "fp8"):
        return {"float16": FLOAT16_BITS, "ternary": TRIT_BITS, "fp8": FP8_BITS}[cls]
    count = min(group_size(storage, columns), columns)
    largest = NormalDist().inv_cdf(1 - 0.25 / (count + 0.5))
    entropy = math.log2(math.sqrt(2 * math.pi * math.e) * LARGEST[cls] / largest)
    return min((1.02 if cls == "int4" else 1.005) * entropy, BITS[cls])


def predicted_bytes(model: ModelConfig) -> int:
    """Return the bytes of the artifact of a trained `model`, without code."""
    bits = 0.0
    table = param_table(model)
    for name, row in table.items():
        scales = SCALE_BITS * math.prod(scales_shape(row.storage, row.shape) or (0,))
        part = math.prod(row.shape) * compressed_bits(row.storage, row.shape[-1]) + scales
        kept = model.engram.keep if name == "engram.table" and model.engram.keep else (1.0,)
        bits += part * sum(kept) / len(kept)  # a pruned row is all zeros, which compress to almost nothing
    return round(bits / 8) + HEADER + HEADER_PER_TENSOR * len(table)


def with_tables(model: ModelConfig) -> dict[Storage, int]:
    """Return the predicted bytes for each storage in TABLES of the embedding and its projections."""
    return {storage: predicted_bytes(changed(model, {"embedding.storage": storage})) for storage in TABLES}


@functools.cache
def packed_code() -> dict[str, int]:
    """Return backend -> bytes of the code that an audit counts: all that the evaluation imports of ours, packed.

    Kernels count, which are imported on a GPU only.
    """
    return {name: claims.packed_code(imported(*EVALUATION, *engine)) for name, engine in ENGINES.items()}


def imported(*modules: str) -> list[Path]:
    """Return the files of `modules` and of all of ours that they import, by their text: none is run here.

    In core only what is imported at once counts, in a backend also what a function imports.
    """
    found: dict[Path, None] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop(0)
        for path in _files(name):
            if path not in found:
                found[path] = None
                waiting += _imports(path)
    return sorted(found, key=str)


def _files(module: str) -> list[Path]:
    """Return the files that importing a module of ours runs: its packages' and its own; none for others' modules."""
    parts = module.split(".")
    places = [Path(ROOT, *parts[: i + 1]) for i in range(len(parts))] if parts[0] in ("core", "backends") else []
    files = [place / "__init__.py" if place.is_dir() else place.with_suffix(".py") for place in places]
    return [file for file in files if file.is_file()]


def _imports(path: Path) -> list[str]:
    """Return the modules that a file imports when it is imported."""
    names, tree = [], ast.parse(read_file(path, 1 << 24))
    for node in ast.walk(tree) if "backends" in path.relative_to(ROOT).parts else tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
