"""Files of named arrays (safetensors), read with reads of our own into memory that their header has to account for.

A file that is mapped ends the process with SIGBUS when it is cut meanwhile, and one that is read whole to be taken
apart needs its size twice.
"""

import json
import os
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import safetensors.numpy

from core.files import FileError, decode_text, new_file, open_file, parse_json, replace_file

Arrays = dict[str, np.ndarray]
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?", "BF16": "<u2",
}  # fmt: skip
"""Kind of value -> numpy's; bfloat16, which numpy does not have, as its bits."""
MAX_HEADER = 16 << 20
"""Bytes of a header: 50,000 arrays."""
MAX_NAME = 256


def write_tensors(path: str | Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write arrays in place of `path`: a kill leaves the old file or the new one."""
    # safetensors stores the memory that a view begins at, not what the view shows.
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    replace_file(path, safetensors.numpy.save(whole, metadata))


class Entry(NamedTuple):
    """An array in a file."""

    kind: str
    """One of DTYPES."""
    shape: tuple[int, ...]
    begin: int = 0
    """Its first byte, counted from where the arrays begin."""

    @property
    def size(self) -> int:
        """Number of bytes."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(DTYPES[self.kind]).itemsize


class TensorsHeader(NamedTuple):
    """What a file says of itself."""

    metadata: dict[str, Any]
    entries: dict[str, Entry]
    """Its arrays, in their order."""
    data: int
    """The byte of the file where the arrays begin."""


def write_parts(
    path: str | Path, entries: dict[str, Entry], metadata: dict[str, str], arrays: Iterable[np.ndarray]
) -> None:
    """Write arrays that come one after another, in the order of `entries`, as `write_tensors` does."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, entry in entries.items():
        header[name] = {"dtype": entry.kind, "shape": list(entry.shape), "data_offsets": [at, at := at + entry.size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), array in zip(entries.items(), arrays, strict=True):
            assert (array.dtype, array.shape) == (np.dtype(DTYPES[entry.kind]), entry.shape), name
            file.write(np.ascontiguousarray(array).data)


def read_tensors(path: str | Path, limit: int) -> tuple[dict[str, Any], Arrays]:
    """Return (metadata, arrays) of a file of at most `limit` bytes; FileError names the field, OSError.

    bfloat16 comes as float32, which has all its values.
    """
    with open_file(path, limit) as file:
        header = read_tensors_header(path, file)
        arrays = {name: widened(read_array(path, file, header, name), e.kind) for name, e in header.entries.items()}
    return header.metadata, arrays


def read_tensors_header(path: str | Path, file: BinaryIO) -> TensorsHeader:
    """Return the header of a file whose arrays it accounts for, byte by byte; FileError names the field, OSError."""
    header, size = _header(path, file)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict:
        _fail(path, "__metadata__", "expected an object")
    for name in header:
        if len(name) > MAX_NAME or not name.isprintable():
            _fail(path, repr(name[:80]), f"expected a printable name of at most {MAX_NAME} letters")
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    order, at = sorted(spans.items(), key=lambda item: item[1][1:]), 0
    for name, (_, begin, end) in order:
        if begin != at:
            _fail(path, name, f"data_offsets: {begin}, expected {at}, of {size} bytes in all")
        if end > size:
            _fail(path, name, f"data_offsets: ends at {end}, but there are {size} bytes: the file was cut")
        at = end
    if at != size:
        _fail(path, "header", f"accounts for {at} of {size} bytes")
    return TensorsHeader(metadata, {name: entry for name, (entry, _, _) in order}, file.tell())


def read_array(path: str | Path, file: BufferedReader, header: TensorsHeader, name: str) -> np.ndarray:
    """Return one array, bfloat16 as its bits; FileError, OSError."""
    entry = header.entries[name]
    array = np.empty(entry.shape, DTYPES[entry.kind])
    raw: Any = array.reshape(-1).view(np.uint8)
    file.seek(header.data + entry.begin)
    if file.readinto(memoryview(raw)) != raw.nbytes:
        _fail(path, name, "the file was cut while it was read")
    return array


def widened(array: np.ndarray, kind: str) -> np.ndarray:
    """Return an array of a kind as numbers: the bits of bfloat16 as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array


def _header(path: str | Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header and how many bytes are to follow it."""
    whole, head = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= length <= min(MAX_HEADER, whole - 8):
        _fail(path, "header", f"{length} bytes long, in a file of {whole}")
    header = parse_json(f"{path}: header", decode_text(f"{path}: header", file.read(length)))
    if type(header) is not dict:
        _fail(path, "header", "expected an object")
    return header, whole - 8 - length


def _span(path: str | Path, name: str, entry: Any) -> tuple[Entry, int, int]:
    """Return an array's entry, begin and end, once they fit each other."""
    entry = entry if type(entry) is dict and entry.keys() == {"dtype", "shape", "data_offsets"} else {}
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(kind) is not str or kind not in DTYPES:
        _fail(path, name, f"dtype {str(kind)[:20]!r}, expected one of {', '.join(DTYPES)}")
    if not all(_whole(numbers) for numbers in (shape, offsets)) or len(offsets) != 2 or len(shape) > 32:
        _fail(path, name, "shape and data_offsets: expected lists of whole numbers from 0 up")
    dtype, count = np.dtype(DTYPES[kind]), 1
    for side in shape:
        count *= side
    if offsets[1] - offsets[0] != count * dtype.itemsize:
        _fail(path, name, f"data_offsets: {offsets[1] - offsets[0]} bytes, shape {shape} has {count} values")
    return Entry(kind, tuple(shape), offsets[0]), offsets[0], offsets[1]


def _whole(numbers: Any) -> bool:
    return type(numbers) is list and all(type(n) is int and 0 <= n < 2**48 for n in numbers)


def _fail(path: str | Path, field: str, problem: str) -> NoReturn:
    raise FileError(f"{path}: {field}: {problem}; the file is damaged")
