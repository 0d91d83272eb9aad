"""The checkpoint of a run, state/checkpoint.safetensors: weights, optimizer state and where training stands."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np

from core.config import RunConfig
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Arrays, DType, Engine
from core.engine.ranks import Ranks, agree, share_arrays
from core.engine.scaffolding import trained_table
from core.files import FileError, open_file, parse_json
from core.formats.kinds import COUNT, FLAG, among, check_value, number, text, whole
from core.formats.tensors import Entry, read_tensors, read_tensors_header, widened, write_parts, write_tensors
from core.model.params import check_arrays
from core.model.upgrade import parameter
from core.training.records import RunError

Shapes = dict[str, tuple[int, ...]]
SCHEMA = 3
READS = (2, SCHEMA)
STATE = {
    "schema": whole("2 or 3", *READS), "step": COUNT, "dtype": among(*get_args(DType)), "quantise": FLAG,
    "seconds": number("a number from 0 up", 0.0, 2.0**1023), "sha256": text(64), "tokens?": COUNT, "fresh?": FLAG,
}  # fmt: skip
"""What it says of itself."""
CURE = "delete it to train from the start"
PIECE = 1 << 22
"""Numbers of a large array that are looked at together."""
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
    tokens: int
    """Tokens of those steps: where the data goes on."""


def write_checkpoint(path: Path, engine: Engine, step: int, seconds: float, tokens: int | None = None) -> None:
    """Write what `engine` holds after `step` steps in place of `path`; OSError (a full disk) leaves what was there.

    `tokens`: of those steps; None: each had as many.
    """
    arrays = {f"param/{name}": value for name, value in engine.params().items()}
    arrays |= {f"optim/{name}": value for name, value in engine.optimizer().items()}
    meta = {"dtype": engine.dtype, "quantise": engine.quantise, "schema": SCHEMA, "seconds": seconds, "step": step}
    meta |= {} if tokens is None else {"tokens": tokens}
    state = json.dumps({**meta, "sha256": digest(arrays)}, separators=(",", ":"), sort_keys=True)
    write_tensors(path, arrays, {"skc": state})


class WeightSource(Protocol):
    """WeightSource that lie elsewhere and are read one after another: all of them may be more than the memory holds."""

    entries: dict[str, Entry]
    """Kind and shape of each, by name."""

    def read(self, name: str) -> np.ndarray:
        """Return one of them, of its kind: bfloat16 as its bits."""
        ...


def write_weights(path: Path, weights: WeightSource) -> None:
    """Write weights as the checkpoint of step 0, in the types that they have, without an optimizer's state (`fresh`).

    They are read twice, the largest is held.
    """
    names, state = sorted(weights.entries), hashlib.sha256()
    for name in names:
        flat, kind = weights.read(name).reshape(-1), weights.entries[name].kind
        for start in range(0, flat.size, PIECE):
            state.update(widened(flat[start : start + PIECE], kind).astype(np.float32).data)
    meta = {"dtype": "float32", "fresh": True, "quantise": False, "schema": SCHEMA, "seconds": 0.0, "step": 0}
    skc = json.dumps({**meta, "sha256": state.hexdigest()}, separators=(",", ":"), sort_keys=True)
    entries = {f"param/{name}": weights.entries[name] for name in names}
    write_parts(path, entries, {"skc": skc}, (weights.read(name) for name in names))


def read_checkpoint(path: Path, config: RunConfig) -> Checkpoint:
    """Read the checkpoint of a run of `config`; RunError names the file and the field that is wrong, OSError.

    No more is read than the table of what is trained and the optimizer's states can have. Of a fresh one
    (`write_weights`) the optimizer's state is zeros, its averages the weights; float16 and bfloat16 come as float32.
    """
    table = {name: row.shape for name, row in trained_table(config.model, config.train).items()}
    return read_arrays(path, table, optimizer_slots(config.model, config.train), config.train.tokens_per_step)


def read_arrays(path: Path, table: Shapes, slots: Shapes, tokens_per_step: int) -> Checkpoint:
    """Read a checkpoint of weights of `table` and an optimizer state of `slots`; errors as of `read_checkpoint`."""
    shapes = [*table.values(), *slots.values()]
    limit = SLACK + sum(512 + 8 * math.prod(shape) for shape in shapes)
    try:
        metadata, arrays = read_tensors(path, limit)
        state = _state(path, metadata)
    except FileError as error:
        raise RunError(str(error) if str(error).endswith(CURE) else f"{error}; {CURE}") from error
    sides: dict[str, Arrays] = {"param": {}, "optim": {}}
    for key, value in arrays.items():
        side, _, name = key.partition("/")
        name = parameter(side, name) if state["schema"] == 2 else name
        if side not in sides or name in sides[side]:
            raise RunError(f"{path}: {key}: unknown tensor")
        if state.get("fresh") and value.dtype == np.float16:
            arrays[key] = value = value.astype(np.float32)
        _check_type(path, key, value)
        sides[side][name] = value
    try:
        check_arrays(sides["param"], table, str(path))
        if state.get("fresh"):
            check_arrays(sides["optim"], {}, f"{path}: optimizer state")
            sides["optim"] = _begun(sides["param"], slots)
        check_arrays(sides["optim"], slots, f"{path}: optimizer state")
    except ValueError as error:
        raise RunError(str(error)) from error
    if state["sha256"] != digest(arrays):
        raise RunError(f"{path}: skc: sha256: the tensors are not the ones that were saved; delete it")
    seconds, tokens = float(state["seconds"]), state.get("tokens", state["step"] * tokens_per_step)
    return Checkpoint(state["step"], seconds, sides["param"], sides["optim"], state["dtype"], state["quantise"], tokens)


def saved_step(path: Path) -> int:
    """Return the step of a checkpoint by its header alone: the arrays are not looked at; RunError, OSError."""
    try:
        with open_file(path) as file:
            return _state(path, read_tensors_header(path, file).metadata)["step"]
    except FileError as error:
        raise RunError(str(error) if str(error).endswith(CURE) else f"{error}; {CURE}") from error


def _state(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of itself; FileError."""
    state = parse_json(f"{path}: skc", str(metadata.get("skc", "")))
    check_value(state, STATE, f"{path}: skc", CURE)
    return state


def _begun(params: Arrays, slots: dict[str, tuple[int, ...]]) -> Arrays:
    """Return the optimizer's state of no step; zeros that nobody writes into take no memory."""
    averages = {f"{name}.ema": value for name, value in params.items()}
    return {
        slot: averages[slot].copy() if slot in averages else np.zeros(shape, np.float32)
        for slot, shape in slots.items()
    }


def _check_type(path: Path, key: str, value: np.ndarray) -> None:
    if value.dtype not in (np.float32, np.float64):
        raise RunError(f"{path}: {key}: dtype {value.dtype}, expected float32 or float64")


def digest(arrays: Arrays) -> str:
    """Return the sha256 of all arrays, in the order of their names."""
    state = hashlib.sha256()
    for _, value in sorted(arrays.items()):
        state.update(np.ascontiguousarray(value).data)
    return state.hexdigest()


def share_checkpoint(ranks: Ranks, saved: Checkpoint | None) -> Checkpoint | None:
    """Return rank 0's checkpoint on every rank."""
    if ranks.world == 1:
        return saved
    head = agree(ranks, saved and {k: v for k, v in saved._asdict().items() if k not in ("params", "optimizer")})
    if head is None:
        return None
    params = share_arrays(ranks, saved and saved.params)
    return Checkpoint(**head, params=params, optimizer=share_arrays(ranks, saved and saved.optimizer))
