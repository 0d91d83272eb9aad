"""Files of arrays: what is written is read, by this reader and by the library; nothing else is. Budget: 2 s."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from core.files import FileError
from core.formats.tensors import DTYPES, read_tensors, write_tensors

LIMIT = 1 << 20


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """Return what a header says of an array."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(path: Path, header: Any, data: bytes) -> Path:
    """Write a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_every_type_comes_back(tmp_path: Path) -> None:
    arrays = {name: np.arange(6).astype(dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    arrays |= {"none": np.zeros((0, 4), np.float32), "one": np.array(1.5)}
    arrays |= {"columns": np.arange(12.0).reshape(2, 6)[:, 1:4], "turned": np.arange(6).reshape(2, 3).T}  # views
    write_tensors(tmp_path / "file", arrays, {"about": "them"})
    metadata, found = read_tensors(tmp_path / "file", LIMIT)
    assert metadata == {"about": "them"} and found.keys() == arrays.keys()
    theirs = safetensors.numpy.load_file(tmp_path / "file")
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape and found[name].flags.writeable
        assert found[name].tobytes() == value.tobytes() == theirs[name].tobytes()


A = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    "header, size, message",
    [
        ({"a": A}, 7, "data_offsets: ends at 8, but there are 7 bytes: the file was cut"),
        ({"a": A}, 12, "accounts for 8 of 12"),
        ({"a": A, "b": entry("F32", [2], 12, 20)}, 20, "data_offsets: 12, expected 8"),
        ({"a": A, "b": entry("F32", [2], 4, 12)}, 12, "data_offsets: 4, expected 8"),
        ({"a": A, "b": A}, 8, "data_offsets: 0, expected 8"),
        ({"a": entry("F32", [3], 0, 8)}, 8, "8 bytes, shape .3. has 3"),
        ({"a": entry("F32", [2**40, 2**40], 0, 8)}, 8, "8 bytes"),
        ({"a": entry("F32", [-2, -1], 0, 8)}, 8, "whole numbers"),
        ({"a": entry("F32", [2.0], 0, 8)}, 8, "whole numbers"),
        ({"a": entry("F32", [True, 2], 0, 8)}, 8, "whole numbers"),
        ({"a": entry("F32", 2, 0, 8)}, 8, "whole numbers"),
        ({"a": entry("O8", [1], 0, 8)}, 8, "dtype 'O8'"),
        ({"a": entry(["F32"], [2], 0, 8)}, 8, "dtype"),
        ({"a": 5}, 0, "dtype"),
        ({"\x1b[31m": A}, 8, "printable name"),
        ({"k" * 1000: A}, 8, "printable name"),
        ({"__metadata__": [1], "a": A}, 8, "__metadata__"),
        ([1], 0, "expected an object"),
        (b"", 8, "header"),
        (b"{" * 100_000, 0, "not JSON"),
        (b"\xff\xff\xff", 0, "not UTF-8"),
    ],
    ids=lambda value: "",
)
def test_what_the_header_does_not_account_for(header: Any, size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message) as caught:
        read_tensors(raw(tmp_path / "file", header, bytes(size)), LIMIT)
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: ") and len(str(caught.value)) < 300


def test_more_than_expected_is_not_read(tmp_path: Path) -> None:
    path = raw(tmp_path / "file", {"a": A}, bytes(8))
    with open(path, "ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(FileError, match="expected at most"):
        read_tensors(path, LIMIT)
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(FileError, match="header"):
        read_tensors(path, LIMIT)
