"""Headers of .npy files, as numpy and MLX write them: matched, not evaluated as the Python literal that they are."""

import re
import struct
from typing import BinaryIO, NamedTuple

MAGIC = b"\x93NUMPY\x01\x00"
MOST = 1 << 12
"""Bytes of the longest header that is read."""
HEADER = re.compile(
    rb"\{'descr': '([<|=]?[A-Za-z][0-9]{0,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?)\),? ?\} *\n"
)


class NpyError(ValueError):
    """Bytes that are not the start of a .npy file of version 1.0."""


class Header(NamedTuple):
    """What the header of an array says."""

    type: str
    """As numpy spells it: <i8."""
    fortran: bool
    shape: tuple[int, ...]


def read_header(file: BinaryIO) -> Header:
    """Read a file up to where its values begin; NpyError."""
    start = file.read(len(MAGIC) + 2)
    if len(start) < len(MAGIC) + 2 or start[: len(MAGIC)] != MAGIC:
        raise NpyError("not a .npy array of version 1.0")
    (length,) = struct.unpack("<H", start[len(MAGIC) :])
    text = file.read(length) if length <= MOST else b""
    match = HEADER.fullmatch(text)
    if len(text) < length or match is None:
        raise NpyError("not a .npy array: its header is cut off or not as numpy writes it")
    sizes = [int(size) for size in match[3].replace(b" ", b"").split(b",") if size]
    if len(sizes) == 1 and not match[3].rstrip().endswith(b","):  # (3) is no tuple
        raise NpyError("not a .npy array: its shape is no tuple")
    return Header(match[1].decode(), match[2] == b"True", tuple(sizes))
