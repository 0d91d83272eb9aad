"""The artifact, schema 0: one file that holds a model, as docs/artifact.md says; its one writer and its one reader."""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import brotli
import numpy as np

from core.config import ConfigError, ModelConfig, from_json, to_json
from core.engine import Arrays
from core.files import replace_file
from core.params import check_arrays, param_table

MAGIC = b"SKCMODEL"
SCHEMA = 0
PREFIX = len(MAGIC) + 4
"""Bytes in front of the header: magic, then the header's length as little-endian uint32."""
MAX_FILE = 64 << 20
MAX_HEADER = 1 << 20
MAX_VALUES = 1 << 28
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
Scalar = str | int | float
Shapes = dict[str, tuple[int, ...]]


class ArtifactError(ValueError):
    """The artifact cannot be written, or is damaged: the message names the file and the field."""


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds."""

    model: ModelConfig
    weights: Arrays
    """float32, decoded from the stored float16, in table order."""
    tokenizer_sha256: str
    provenance: dict[str, Scalar]
    size: int
    """Bytes of the file."""


def write_artifact(
    path: str | Path,
    model: ModelConfig,
    weights: Arrays,
    *,
    tokenizer_sha256: str,
    provenance: dict[str, Scalar],
    quality: int,
) -> int:
    """Write `weights` rounded to float16 and return the bytes of the file; the same input gives the same bytes.

    `provenance` is a flat dict of printable ASCII text and finite numbers, without times or paths. `quality` is
    brotli's, 0 to 11. ArtifactError names a tensor that is not finite or overflows float16, or a limit that is passed;
    ValueError names a tensor that is not the model's.
    """
    model = from_json(ModelConfig, to_json(model), "model")  # a whole number given for a float is stored as a float
    shapes = _shapes(path, model)
    check_arrays(weights, shapes, str(path))
    _check_strings(path, tokenizer_sha256, provenance)
    halves = b"".join(_to_float16(path, name, weights[name]) for name in shapes)
    raw = np.frombuffer(halves, np.uint8).reshape(-1, 2).T.tobytes()  # low bytes, then high: brotli finds more
    payload = brotli.compress(raw, quality=quality)
    sha256 = hashlib.sha256(raw).hexdigest()
    header = _dumps(_header(model, shapes, tokenizer_sha256, provenance, len(payload), sha256))
    size = PREFIX + len(header) + len(payload)
    if len(header) > MAX_HEADER or size > MAX_FILE:
        _fail(path, "size", f"header {len(header)}, file {size} bytes; at most {MAX_HEADER} and {MAX_FILE}")
    replace_file(path, MAGIC, len(header).to_bytes(4, "little"), header, payload)
    return size


def read_artifact(path: str | Path) -> Artifact:
    """Read an artifact; ArtifactError names the field that is wrong. Memory and time are bounded for any bytes."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, MAX_FILE))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}; give the path of an artifact file") from error
    if size > MAX_FILE:
        _fail(path, "size", f"{size} bytes; at most {MAX_FILE}")
    if data[: len(MAGIC)] != MAGIC:
        _fail(path, "magic", "this is not an artifact")
    length = int.from_bytes(data[len(MAGIC) : PREFIX], "little")
    if length > MAX_HEADER or PREFIX + length > len(data):
        _fail(path, "header length", f"{length} bytes; the file has {len(data)}, a header at most {MAX_HEADER}")
    model, shapes, header = _parse(path, data[PREFIX : PREFIX + length])
    payload = memoryview(data)[PREFIX + length :]
    if len(payload) != header["payload_bytes"]:
        _fail(path, "payload_bytes", f"the header says {header['payload_bytes']}, the file has {len(payload)}")
    raw = _inflate(path, payload, _raw_bytes(shapes))
    if hashlib.sha256(raw).hexdigest() != header["sha256"]:
        _fail(path, "sha256", "the tensors are not the ones that were written")
    weights = _from_float16(path, raw, shapes)
    return Artifact(model, weights, header["tokenizer_sha256"], header["provenance"], len(data))


def _fail(path: str | Path, field: str, problem: str) -> NoReturn:
    raise ArtifactError(f"{path}: {field}: {problem}")


def _dumps(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _shapes(path: str | Path, model: ModelConfig) -> Shapes:
    """Return the shapes of the model's table, in order, after bounding what it takes to build the table and hold it."""
    if model.layers > MAX_LAYERS:
        _fail(path, "model.layers", f"{_printable(model.layers)}; at most {MAX_LAYERS}")
    for name in ("vocab", "dim", "heads", "mlp_hidden", "embed_dim"):
        if (getattr(model, name) or 0) > MAX_WIDTH:
            _fail(path, f"model.{name}", f"{_printable(getattr(model, name))}; at most {MAX_WIDTH}")
    shapes = {name: row.shape for name, row in param_table(model).items()}
    if _raw_bytes(shapes) > 2 * MAX_VALUES:
        _fail(path, "model", f"{_raw_bytes(shapes) // 2} values; at most {MAX_VALUES}")
    return shapes


def _raw_bytes(shapes: Shapes) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _header(
    model: ModelConfig,
    shapes: Shapes,
    tokenizer_sha256: str,
    provenance: dict[str, Scalar],
    payload_bytes: int,
    sha256: str,
) -> dict[str, Any]:
    """Return the header: the only one that these values can have, so the reader compares instead of interpreting."""
    return {
        "schema": SCHEMA,
        "model": to_json(model),
        "tokenizer_sha256": tokenizer_sha256,
        "tensors": [[name, "float16", list(shape)] for name, shape in shapes.items()],
        "raw_bytes": _raw_bytes(shapes),
        "payload_bytes": payload_bytes,
        "sha256": sha256,
        "provenance": provenance,
    }


def _check_strings(path: str | Path, tokenizer_sha256: Any, provenance: Any) -> None:
    if not _is_sha256(tokenizer_sha256):
        _fail(path, "tokenizer_sha256", "expected 64 lower-case hexadecimal digits")
    if type(provenance) is not dict:
        _fail(path, "provenance", "expected an object")
    for key, value in provenance.items():
        if not _plain(key) or not (
            _plain(value) or type(value) is int or (type(value) is float and math.isfinite(value))
        ):
            _fail(path, "provenance", "expected names with printable ASCII text or finite numbers")


def _plain(value: Any) -> bool:
    return type(value) is str and value.isascii() and value.isprintable()


def _printable(value: Any) -> str:
    """Return hostile text fit for one line of a terminal."""
    return str(value).encode("unicode_escape").decode()[:200]


def _is_sha256(value: Any) -> bool:
    return type(value) is str and re.fullmatch("[0-9a-f]{64}", value) is not None


def _parse(path: str | Path, text: bytes) -> tuple[ModelConfig, Shapes, dict[str, Any]]:
    """Return (model, shapes, header) of a header that is, byte for byte, what the writer makes of its values."""
    try:
        header = json.loads(text.decode("ascii"))
        canonical = _dumps(header)
    except (ValueError, RecursionError):
        _fail(path, "header", "not ASCII JSON with finite numbers")
    if type(header) is not dict or canonical != text:
        _fail(path, "header", "not a JSON object in canonical form (sorted keys, no spaces, no key twice)")
    if type(header.get("schema")) is not int or header["schema"] != SCHEMA:
        _fail(path, "schema", f"{_printable(header.get('schema'))}; this reader knows {SCHEMA}")
    _check_strings(path, header.get("tokenizer_sha256"), header.get("provenance"))
    if not _is_sha256(header.get("sha256")):
        _fail(path, "sha256", "expected 64 lower-case hexadecimal digits")
    if type(header.get("payload_bytes")) is not int:
        _fail(path, "payload_bytes", "expected a whole number")
    try:
        model = from_json(ModelConfig, header.get("model"), "model")
    except ConfigError as error:
        raise ArtifactError(f"{path}: {_printable(error)}") from error
    shapes = _shapes(path, model)
    given = (header[name] for name in ("tokenizer_sha256", "provenance", "payload_bytes", "sha256"))
    expected = _header(model, shapes, *given)
    for name in expected | header:
        if name not in expected or name not in header or _dumps(header[name]) != _dumps(expected[name]):
            _fail(path, _printable(name), "missing, unknown, or not what the model's table says")
    return model, shapes, header


def _inflate(path: str | Path, payload: memoryview, size: int) -> bytes:
    """Return the `size` bytes of a brotli stream, stopping one buffer past them whatever the stream holds."""
    decoder = brotli.Decompressor()
    try:
        raw = decoder.process(payload, output_buffer_limit=size + 1)
    except brotli.error:
        _fail(path, "payload", "not one whole brotli stream")
    if len(raw) != size or not decoder.is_finished():
        _fail(path, "payload", f"it does not hold the {size} bytes of the model's tensors")
    return raw


def _to_float16(path: str | Path, name: str, values: np.ndarray) -> bytes:
    if not np.isfinite(values).all():
        _fail(path, name, "has a value that is not finite; train again from a sound checkpoint")
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        _fail(path, name, "has a value beyond float16's largest, 65504")
    return half.tobytes()


def _from_float16(path: str | Path, raw: bytes, shapes: Shapes) -> Arrays:
    weights, offset = {}, 0
    halves = np.frombuffer(raw, np.uint8).reshape(2, -1).T.tobytes()
    for name, shape in shapes.items():
        half = np.frombuffer(halves, "<f2", math.prod(shape), offset)
        if not np.isfinite(half).all():
            _fail(path, name, "has a value that is not finite")
        weights[name] = half.astype(np.float32).reshape(shape)
        offset += half.nbytes
    return weights
