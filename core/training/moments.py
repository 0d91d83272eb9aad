"""Second moments of training text in a run folder: kept while the training clock runs, read when it has stopped."""

from pathlib import Path

import numpy as np

from core.config import ModelConfig
from core.engine.protocol import Arrays
from core.files import FileError
from core.formats.tensors import read_tensors, write_tensors
from core.model.params import check_arrays, param_table
from core.model.storage import gridded
from core.training.records import RunError

SLACK = 1 << 16


def write_moments(path: Path, moments: Arrays, of: str) -> None:
    """Write moments; `of`: what they depend on."""
    write_tensors(path, moments, {"of": of, "tensors": str(len(moments))})


def read_moments(path: Path, model: ModelConfig, of: str) -> Arrays | None:
    """Return the moments of `of` that a file keeps, None if there is none or it keeps others; RunError."""
    if not path.exists():
        return None
    table = {name: row.shape for name, row in param_table(model).items() if gridded(row.storage)}
    squares = {name: (shape[-1],) * 2 for name, shape in table.items()}
    try:
        metadata, arrays = read_tensors(path, SLACK + sum(512 + 4 * np.prod(s, dtype=int) for s in squares.values()))
        check_arrays(arrays, {name: squares.get(name, ()) for name in arrays}, str(path))
        if metadata.get("tensors") != str(len(arrays)):
            raise ValueError(f"{path}: {len(arrays)} tensors, expected {metadata.get('tensors')}")
    except (FileError, ValueError) as error:
        raise RunError(f"{error}; delete it and export again, or take another export.calibration") from error
    return arrays if metadata.get("of") == of else None
