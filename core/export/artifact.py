"""The artifact, schema 2: one file that holds a model, as docs/artifact.md says; its one writer and its one reader."""

import hashlib
import itertools
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
from core.files import FileError, open_input, replace_file
from core.model.params import Param, check_arrays, count, param_table
from core.model.storage import Stored, decode

MAGIC = b"SKCMODEL"
SCHEMA = 2
PREFIX = len(MAGIC) + 4
"""Bytes in front of the header: magic, then the header's length as little-endian uint32."""
MAX_FILE = 64 << 20
MAX_HEADER = 1 << 20
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
        raw = codecs.pack(stored, table)
    except codecs.CodecError as error:
        raise ArtifactError(f"{path}: {error}; train again from a sound checkpoint") from error
    payloads = {name: codecs.compress(name, part) for name, part in raw.items()}
    given = [{"payload_bytes": len(payloads[n]), "sha256": hashlib.sha256(part).hexdigest()} for n, part in raw.items()]
    header = _dumps(_header(model, table, tokenizer_sha256, provenance, given, list(payloads.values())))
    size = PREFIX + len(header) + sum(map(len, payloads.values()))
    if len(header) > MAX_HEADER or size > MAX_FILE:
        _fail(path, "size", f"header {len(header)}, file {size} bytes; at most {MAX_HEADER} and {MAX_FILE}")
    replace_file(path, MAGIC, len(header).to_bytes(4, "little"), header, *payloads.values())
    return size


def check_limits(model: ModelConfig) -> None:
    """Raise ArtifactError for a model that no artifact can hold, so that it is not trained in vain."""
    size = sum(codecs.stream_sizes(_table("artifact", model)).values())
    if size > MAX_FILE:
        _fail("artifact", "size", f"{size} bytes before compression; an artifact holds at most {MAX_FILE}")


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
    model, table, header, payloads = _parse(path, data[PREFIX : PREFIX + length], payload)
    try:
        streams = {}
        for entry, part in zip(header["streams"], payloads, strict=True):
            raw = codecs.inflate(entry["name"], part, entry["raw_bytes"])
            if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
                raise codecs.CodecError(entry["name"], "sha256: the bytes are not the ones that were written")
            streams[entry["name"]] = raw
        stored = codecs.unpack(streams, table)
    except codecs.CodecError as error:
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
        return param_table(model)
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _header(
    model: ModelConfig,
    table: Table,
    tokenizer_sha256: str,
    provenance: dict[str, Scalar],
    given: list[dict[str, Any]],
    payloads: list[Any],
) -> dict[str, Any]:
    """Return the header: the only one that these values can have, so the reader compares instead of interpreting.

    `given` holds payload_bytes and sha256 of every stream.
    """
    streams = [
        {"name": name, "raw_bytes": size, "window": codecs.window_bits(payload), **part}
        for (name, size), part, payload in zip(codecs.stream_sizes(table).items(), given, payloads, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "model": chosen(model),
        "tokenizer_sha256": tokenizer_sha256,
        "tensors": [[name, row.storage, list(row.shape)] for name, row in table.items()],
        "streams": streams,
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


def _parse(
    path: str | Path, text: bytes, payload: memoryview
) -> tuple[ModelConfig, Table, dict[str, Any], list[memoryview]]:
    """Return what is in a header that is, byte for byte, what the writer makes of its values."""
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
    given = _given(path, header.get("streams"), len(codecs.stream_sizes(table)))
    ends = [0, *itertools.accumulate(part["payload_bytes"] for part in given)]
    if ends[-1] != len(payload):
        _fail(path, "payload_bytes", f"the header says {ends[-1]} in all, the file has {len(payload)}")
    payloads = [payload[a:b] for a, b in itertools.pairwise(ends)]
    expected = _header(model, table, header["tokenizer_sha256"], header["provenance"], given, payloads)
    for name in expected | header:
        if name not in expected or name not in header or _dumps(header[name]) != _dumps(expected[name]):
            _fail(path, _printable(name), "missing, unknown, or not what the model's table says")
    return model, table, header, payloads


def _given(path: str | Path, streams: Any, count: int) -> list[dict[str, Any]]:
    """Return payload_bytes and sha256 of every stream of a header, checked."""
    if type(streams) is not list or len(streams) != count:
        _fail(path, "streams", f"expected a list of the {count} streams of the model's table")
    out = []
    for number, entry in enumerate(streams):
        entry = entry if type(entry) is dict else {}
        size, sha256 = entry.get("payload_bytes"), entry.get("sha256")
        if type(size) is not int or not 0 <= size <= MAX_FILE:
            _fail(path, f"streams[{number}].payload_bytes", f"expected a whole number from 0 to {MAX_FILE}")
        if not _is_sha256(sha256):
            _fail(path, f"streams[{number}].sha256", "expected 64 lower-case hexadecimal digits")
        out.append({"payload_bytes": size, "sha256": sha256})
    return out
