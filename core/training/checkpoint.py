"""The checkpoint of a run, state/checkpoint.safetensors: weights, optimizer state and where training stands."""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from core.checks import in_words
from core.config import RunConfig
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Arrays, DType, Engine
from core.files import FileError, parse_json
from core.formats.tensors import read_tensors, write_tensors
from core.model.params import check_arrays, param_table
from core.model.upgrade import parameter
from core.training.records import RunError

SCHEMA = 3
READS = (2, SCHEMA)
SLACK = 1 << 16
"""Bytes that a checkpoint may have beside its arrays, and 512 more for each of them: its header."""


class Checkpoint(NamedTuple):
    """What state/checkpoint.safetensors holds."""

    step: int
    """Steps done."""
    seconds: float
    """Training time so far."""
    params: Arrays
    optimizer: Arrays
    dtype: str
    """Compute type that it was trained in."""
    quantise: bool
    """Whether forward passes use the stored form of the weights."""


def write_checkpoint(path: Path, engine: Engine, step: int, seconds: float) -> None:
    """Write what `engine` holds after `step` steps in place of `path`; OSError (a full disk) leaves what was there."""
    arrays = {f"param/{name}": value for name, value in engine.params().items()}
    arrays |= {f"optim/{name}": value for name, value in engine.optimizer().items()}
    meta = {"dtype": engine.dtype, "quantise": engine.quantise, "schema": SCHEMA, "seconds": seconds, "step": step}
    state = json.dumps({**meta, "sha256": digest(arrays)}, separators=(",", ":"), sort_keys=True)
    write_tensors(path, arrays, {"skc": state})


def read_checkpoint(path: Path, config: RunConfig) -> Checkpoint:
    """Read the checkpoint of a run of `config`; RunError names the file and the field that is wrong, OSError.

    No more is read than the model's table and the optimizer's states can have.
    """
    table = {name: row.shape for name, row in param_table(config.model).items()}
    slots = optimizer_slots(config.model, config.train)
    shapes = [*table.values(), *slots.values()]
    limit = SLACK + sum(512 + 8 * math.prod(shape) for shape in shapes)
    try:
        metadata, arrays = read_tensors(path, limit)
        state = parse_json(f"{path}: skc", str(metadata.get("skc", "")))
    except FileError as error:
        raise RunError(f"{error}; delete it to train from the start") from error
    _check_state(path, state)
    sides: dict[str, Arrays] = {"param": {}, "optim": {}}
    for key, value in arrays.items():
        side, _, name = key.partition("/")
        name = parameter(side, name) if state["schema"] == 2 else name
        if side not in sides or name in sides[side]:
            raise RunError(f"{path}: {key}: unknown tensor")
        _check_type(path, key, value)
        sides[side][name] = value
    try:
        check_arrays(sides["param"], table, str(path))
        check_arrays(sides["optim"], slots, f"{path}: optimizer state")
    except ValueError as error:
        raise RunError(str(error)) from error
    if state.get("sha256") != digest(arrays):
        raise RunError(f"{path}: skc: sha256: the tensors are not the ones that were saved; delete it")
    seconds = float(state.get("seconds", -1.0))
    return Checkpoint(state["step"], seconds, sides["param"], sides["optim"], state["dtype"], state["quantise"])


def _check_state(path: Path, state: object) -> None:
    """Raise RunError unless what the file says of itself is what the writer says."""
    if not isinstance(state, dict):
        raise RunError(f"{path}: skc: expected an object, got {type(state).__name__}")
    step, seconds = state.get("step"), state.get("seconds", -1.0)
    if type(state.get("schema")) is not int or state["schema"] not in READS or type(step) is not int or step < 0:
        raise RunError(
            f"{path}: skc: schema {in_words(state.get('schema'))}, step {in_words(step)}: not a checkpoint of this "
            "version; delete it to train from the start"
        )
    if step >= 2**53:
        raise RunError(f"{path}: skc: step {in_words(step)}: no run is as long; delete it to train from the start")
    if state.get("dtype") not in get_args(DType):
        types = ", ".join(get_args(DType))
        raise RunError(f"{path}: skc: dtype: {in_words(state.get('dtype'))}, expected one of {types}")
    if type(state.get("quantise")) is not bool:
        raise RunError(f"{path}: skc: quantise: {in_words(state.get('quantise'))}, expected true or false")
    if type(seconds) not in (int, float) or not 0 <= seconds < 2.0**1023:  # a float can hold it
        raise RunError(f"{path}: skc: seconds: {in_words(seconds)}, expected a number from 0 up")


def _check_type(path: Path, key: str, value: np.ndarray) -> None:
    if value.dtype not in (np.float32, np.float64):
        raise RunError(f"{path}: {key}: dtype {value.dtype}, expected float32 or float64")


def digest(arrays: Arrays) -> str:
    """Return the sha256 of all arrays, in the order of their names."""
    state = hashlib.sha256()
    for _, value in sorted(arrays.items()):
        state.update(np.ascontiguousarray(value).data)
    return state.hexdigest()
