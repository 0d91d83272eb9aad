"""The artifact, schema 3: one file that holds a model, as docs/artifact.md says; its one writer and its one reader."""

import hashlib
import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from core.config import ConfigError, ModelConfig, chosen, from_json, to_json
from core.engine.protocol import Arrays
from core.export import codecs
from core.export.coder import CodecError
from core.files import FileError, open_input, replace_file
from core.model.params import Param, check_arrays, count, param_table
from core.model.storage import Stored, decode, raw_bits

MAGIC = b"SKCMODEL"
SCHEMA = 3
PREFIX = len(MAGIC) + 4
"""Bytes in front of the header: magic, then the header's length as little-endian uint32."""
MAX_FILE = 64 << 20
MAX_HEADER = 1 << 20
MAX_VALUES = 1 << 28
"""Most values of a model in an artifact: a small file can stand for many, all of which its reader allocates."""
Scalar = str | int | float
Table = dict[str, Param]


class ArtifactError(ValueError):
    """The artifact cannot be written, or is damaged: the message names the file and the field."""


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds."""

    model: ModelConfig
    stored: dict[str, Stored]
    """Codes and scales, in table order."""
    tokenizer_sha256: str
    provenance: dict[str, Scalar]
    size: int
    """Bytes of the file."""

    @property
    def weights(self) -> Arrays:
        """The float32 weights that codes and scales stand for: bit for bit those of a quantised forward pass."""
        table = param_table(self.model)
        try:
            return {name: decode(stored, table[name].storage) for name, stored in self.stored.items()}
        except MemoryError:
            raise ArtifactError(f"too little memory for {count(self.model)} float32 weights") from None


def write_artifact(
    path: str | Path,
    model: ModelConfig,
    stored: dict[str, Stored],
    *,
    tokenizer_sha256: str,
    provenance: dict[str, Scalar],
) -> int:
    """Pack what `Engine.quantised` returned and return the bytes of the file; the same input gives the same bytes.

    `provenance` is a flat dict of printable ASCII text and finite numbers, without times or paths. ArtifactError names
    a tensor that its storage class cannot hold, or a limit that is passed; ValueError one that is not the model's.
    """
    model = from_json(ModelConfig, to_json(model), "model")  # a whole number given for a float is stored as a float
    table = _table(path, model)
    check_arrays({n: s.codes for n, s in stored.items()}, {n: row.shape for n, row in table.items()}, str(path))
    _check_strings(path, tokenizer_sha256, provenance)
    try:
        payload = codecs.pack(stored, table)
    except CodecError as error:
        raise ArtifactError(f"{path}: {error}; train again from a sound checkpoint") from error
    header = _dumps(_header(model, table, tokenizer_sha256, provenance, payload))
    size = PREFIX + len(header) + len(payload)
    if len(header) > MAX_HEADER or size > MAX_FILE:
        _fail(path, "size", f"header {len(header)}, file {size} bytes; at most {MAX_HEADER} and {MAX_FILE}")
    replace_file(path, MAGIC, len(header).to_bytes(4, "little"), header, payload)
    return size


def check_limits(model: ModelConfig) -> None:
    """Raise ArtifactError for a model that no artifact can hold, so that it is not trained in vain."""
    size = sum(raw_bits(row.storage, row.shape) for row in _table("artifact", model).values()) / 8
    if size > MAX_FILE:
        _fail("artifact", "size", f"{size:.0f} bytes before compression; an artifact holds at most {MAX_FILE}")


def read_artifact(path: str | Path) -> Artifact:
    """Read an artifact; ArtifactError names the field that is wrong. Memory and time are bounded for any bytes."""
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, MAX_FILE))
    except FileError as error:
        raise ArtifactError(f"{error}; give the path of an artifact file") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}; give the path of an artifact file") from error
    if size > MAX_FILE:
        _fail(path, "size", f"{size} bytes; at most {MAX_FILE}")
    if data[: len(MAGIC)] != MAGIC:
        _fail(path, "magic", "this is not an artifact")
    length = int.from_bytes(data[len(MAGIC) : PREFIX], "little")
    if length > MAX_HEADER or PREFIX + length > len(data):
        _fail(path, "header length", f"{length} bytes; the file has {len(data)}, a header at most {MAX_HEADER}")
    payload = memoryview(data)[PREFIX + length :]
    model, table, header = _parse(path, data[PREFIX : PREFIX + length], payload)
    try:
        stored = codecs.unpack(payload, table)
    except CodecError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except MemoryError:
        _fail(path, "model", "this machine has too little memory for it")
    return Artifact(model, stored, header["tokenizer_sha256"], header["provenance"], len(data))


def unreadable(path: str | Path) -> str | None:
    """Return why the artifact at `path` cannot be read; None where it can, or where there is none."""
    try:
        if os.path.lexists(path):
            read_artifact(path)
    except ArtifactError as error:
        return str(error)
    return None


def _fail(path: str | Path, field: str, problem: str) -> NoReturn:
    raise ArtifactError(f"{path}: {field}: {problem}")


def _dumps(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _table(path: str | Path, model: ModelConfig) -> Table:
    try:
        table = param_table(model)
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}") from error
    values = sum(row.size for row in table.values())
    if values > MAX_VALUES:
        _fail(path, "model", f"{values:,} parameters, expected at most {MAX_VALUES:,}")
    return table


def _header(
    model: ModelConfig,
    table: Table,
    tokenizer_sha256: str,
    provenance: dict[str, Scalar],
    payload: bytes | memoryview,
) -> dict[str, Any]:
    """Return the header: the only one that these values can have, so the reader compares instead of interpreting."""
    tensors = _dumps([[name, row.storage, list(row.shape)] for name, row in table.items()])
    return {
        "schema": SCHEMA,
        "model": chosen(model),
        "tokenizer_sha256": tokenizer_sha256,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
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


def _run_of(path: str | Path) -> str:
    """Return the run folder that an artifact lies in, or RUN where it lies in none."""
    folder = Path(path).parent
    return shlex.quote(str(folder)) if (folder / "config.json").is_file() else "RUN"


def _is_sha256(value: Any) -> bool:
    return type(value) is str and re.fullmatch("[0-9a-f]{64}", value) is not None


def _parse(path: str | Path, text: bytes, payload: memoryview) -> tuple[ModelConfig, Table, dict[str, Any]]:
    """Return what is in a header that is, byte for byte, what the writer makes of its values and the payload."""
    try:
        header = json.loads(text.decode("ascii"))
        canonical = _dumps(header)
    except (ValueError, RecursionError):
        _fail(path, "header", "not ASCII JSON with finite numbers")
    if type(header) is not dict or canonical != text:
        _fail(path, "header", "not a JSON object in canonical form (sorted keys, no spaces, no key twice)")
    if type(header.get("schema")) is not int or header["schema"] != SCHEMA:
        again = f"write it again from its run: skc export {_run_of(path)}"
        _fail(path, "schema", f"{_printable(header.get('schema'))}; this version reads {SCHEMA}: {again}")
    _check_strings(path, header.get("tokenizer_sha256"), header.get("provenance"))
    try:
        model = from_json(ModelConfig, header.get("model"), "model")
    except ConfigError as error:
        raise ArtifactError(f"{path}: {_printable(error)}") from error
    table = _table(path, model)
    expected = _header(model, table, header["tokenizer_sha256"], header["provenance"], payload)
    for name in expected | header:
        if name not in expected or name not in header or _dumps(header[name]) != _dumps(expected[name]):
            what = "missing, unknown, or not that of the model's table or of the bytes that follow"
            _fail(path, _printable(name), what)
    return model, table, header
