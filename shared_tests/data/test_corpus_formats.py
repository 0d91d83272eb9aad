"""Zstandard and parquet inputs of `skc data prepare`: the same documents, damage named by file and row. Budget: 8 s."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import core.data.corpus
from core.data.bundled import BUNDLED
from core.data.corpus import find_inputs, read_documents
from core.data.dataset import DataError, open_dataset
from core.data.prepare import prepare

MODEL = str(BUNDLED / "tokenizer.model")
TEXTS = ["café", "two\nlines", "", "third ☃", *(f"document {i} says {i * i}" for i in range(300))]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def parquet(path: Path, texts: list[Any], kind: Any = None, name: str = "text", **options: Any) -> str:
    table = pyarrow.table({"id": list(range(len(texts))), name: pyarrow.array(texts, kind or pyarrow.string())})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **options)
    return str(path)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_zst_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also in several frames, with a skippable one between them, and cut anywhere by the chunks that are read."""
    monkeypatch.setattr(core.data.corpus, "ZST_CHUNK", chunk)
    skipped = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    (tmp_path / "a.jsonl.zst").write_bytes(packed(LINES[:100]) + skipped + packed(LINES[100:]))
    (tmp_path / "b.txt.zst").write_bytes(packed("first\fsecond é".encode()))
    (tmp_path / "c.txt.zst").write_bytes(packed(b""))
    seen: list[tuple[int, int]] = []
    paths = [str(tmp_path / name) for name in ("a.jsonl.zst", "b.txt.zst", "c.txt.zst")]
    read = list(read_documents(paths, lambda done, total: seen.append((done, total))))
    assert read == [*TEXTS, "first", "second é", ""]
    total = sum(Path(path).stat().st_size for path in paths)
    assert seen[-1] == (total, total) and all(0 <= done <= total for done, _ in seen)


KINDS = {
    "string": pyarrow.string(), "large": pyarrow.large_string(), "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet_gives_the_same_documents(tmp_path: Path, kind: str, compression: str) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS, KINDS[kind], row_group_size=70, compression=compression)
    empty = parquet(tmp_path / "b.parquet", [])
    seen: list[tuple[int, int]] = []
    assert list(read_documents([path, empty], lambda done, total: seen.append((done, total)))) == TEXTS
    dones = [done for done, _ in seen]
    assert dones == sorted(dones) and len(set(dones)) >= 4 and seen[-1][0] == seen[-1][1]


def test_every_kind_is_prepared_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(packed(LINES))
    parquet(tmp_path / "a.parquet", TEXTS)
    splits = []
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet"):
        prepare([str(tmp_path / name)], str(tmp_path / "out" / name), tokenizer=MODEL)
        splits.append(open_dataset(str(tmp_path / "out" / name)).manifest["splits"])
    assert splits[0] == splits[1] == splits[2]


def spoilt(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def bad_utf8(path: Path) -> bytes:
    broken = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(struct.pack("<2i", 0, 2)), pyarrow.py_buffer(b"x\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), path)
    return path.read_bytes()


def plain(path: Path, texts: list[Any], **options: Any) -> bytes:
    return Path(parquet(path, texts, use_dictionary=False, compression="none", **options)).read_bytes()


BAD: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    r"a.txt.zst: damaged compressed file \(it ends before": ("a.txt.zst", lambda _: packed(b"hello" * 100)[:-5]),
    "a.txt.zst: damaged compressed file": ("a.txt.zst", lambda _: b"hello"),
    "a.jsonl.zst: damaged compressed file .*hecksum": ("a.jsonl.zst", lambda _: spoilt(packed(LINES), -1)),
    r"a.jsonl.zst: damaged compressed file \(it": ("a.jsonl.zst", lambda _: packed(LINES) + packed(LINES)[:9]),
    "a.jsonl.zst:2: not JSON": ("a.jsonl.zst", lambda _: packed(b'{"text": "x"}\n{"text": \n')),
    "a.txt.zst: document 2: not UTF-8": ("a.txt.zst", lambda _: packed(b"good\f\xff")),
    "a.txt.zst: document 1 is over 40 bytes": ("a.txt.zst", lambda _: packed(b"y" * 100)),
    "a.parquet: damaged parquet file": ("a.parquet", lambda _: b"hello"),
    "a.parquet: damaged parquet file .*ooter": ("a.parquet", lambda p: plain(p, TEXTS)[:-20]),
    "a.parquet: damaged parquet file .*(CRC|checksum)": (
        "a.parquet", lambda p: plain(p, TEXTS).replace(b"document 250 says", b"document 250 sayz"),
    ),
    "a.parquet: damaged parquet file .*utf-8": ("a.parquet", bad_utf8),
    "a.parquet: expected one column text or content or raw_content, got id, body: name it by --column": (
        "a.parquet", lambda p: plain(p, TEXTS, name="body"),
    ),
    "a.parquet: text: expected a column of strings, got binary": (
        "a.parquet", lambda p: plain(p, [b"a"], kind=pyarrow.binary()),
    ),
    "a.parquet: row 2: text: expected a string, got null": (
        "a.parquet", lambda p: plain(p, ["a", None], kind=pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    ),
    "a.parquet: text: expected a column of strings, got int64": (
        "a.parquet", lambda p: plain(p, [1, 2], kind=pyarrow.int64()),
    ),
    "a.parquet: row 3: text: expected a string, got null": ("a.parquet", lambda p: plain(p, ["a", "b", None])),
    "a.parquet: row 2: text is over 40 bytes": ("a.parquet", lambda p: plain(p, ["a", "b" * 41])),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    name, make = BAD[message]
    content = make(tmp_path / name)
    if "40 bytes" in message:
        monkeypatch.setattr(core.data.corpus, "MAX_DOCUMENT", 40)
        monkeypatch.setattr(core.data.corpus, "CHUNK", 60)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare([str(tmp_path / name)], str(tmp_path / "out"), tokenizer=MODEL)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name], "something half-made was left"


@pytest.mark.parametrize("name, module, package", [
    ("a.txt.zst", "zstandard", "zstandard"), ("a.parquet", "pyarrow.parquet", "pyarrow"),
])  # fmt: skip
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    find_inputs([str(tmp_path / name)])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        DataError, match=rf"{name}: .* needs {package}, which is not installed; run: pip install .*data"
    ):
        find_inputs([str(tmp_path / name)])


def test_a_small_file_of_much_text_is_unpacked_a_piece_at_a_time(tmp_path: Path) -> None:
    """64 MiB of zeros in 2 KB: no more than 32 MiB of it are ever in memory."""
    (tmp_path / "a.txt.zst").write_bytes(packed(bytes(1 << 26)))
    assert (tmp_path / "a.txt.zst").stat().st_size < 5_000
    with open(tmp_path / "a.txt.zst", "rb") as stored:
        reader, buffer, most, size = core.data.corpus._Zst("a", stored), bytearray(1 << 20), 0, 0
        while count := reader.readinto(buffer):
            size += count
            most = max(most, count + len(reader._text))
    assert size == 1 << 26 and most <= 1 << 25
    with pytest.raises(DataError, match="document 1 is over"):
        list(read_documents([str(tmp_path / "a.txt.zst")]))
