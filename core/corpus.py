"""Documents out of files, one at a time: .txt and .jsonl, each also .gz, .xz and .zst, and .parquet."""

import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from core.shards import DataError

MAX_DOCUMENT = 1 << 24
"""Bytes of the longest document, or JSON line, that is accepted: encoding one takes about 60 times its size."""
PACKED = ("", ".gz", ".xz", ".zst")
SUFFIXES = (*(f"{kind}{packed}" for packed in PACKED for kind in (".txt", ".jsonl")), ".parquet")
LIBRARIES = {".zst": "zstandard", ".parquet": "pyarrow.parquet"}
"""Suffix -> the optional module that reads it."""
CHUNK = 1 << 20
ZST_CHUNK = 1 << 10
"""Compressed bytes that are unpacked at once: 1 KiB of zstd can hold up to 32 MiB of text."""
PARQUET_ROWS = 64
REPORT_EVERY = 64


def document_hash(text: str) -> bytes:
    """Return the 16 bytes that stand for a document when splits are compared (blake2b of its UTF-8)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def library(module: str, what: str) -> Any:
    """Import an optional module; DataError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        command = "pip install -c constraints.txt -e '.[data]'"
        raise DataError(f"{what} needs {package}, which is not installed; run: {command}") from error


def check_inputs(paths: Sequence[str]) -> None:
    """Raise DataError unless every path is a file of a known kind, for which the library is there."""
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file")
        if not path.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; expected a name that ends in {', '.join(SUFFIXES)}")
        for suffix, module in LIBRARIES.items():
            if path.endswith(suffix):
                library(module, f"{path}: a {suffix} file")


def read_documents(paths: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """Yield the text of every document, in order; DataError names the file and the line, row or document.

    .jsonl: one object with a "text" a line, empty lines are skipped. .txt: one document a file, or several separated
    by form feeds. .parquet: the rows of its column "text". `progress` gets the bytes read so far and in all, as stored
    on disk.
    """
    total = sum(map(os.path.getsize, paths))
    before = 0
    for path in paths:
        with open(path, "rb") as stored:
            found = _parquet(path, stored) if path.endswith(".parquet") else _lines_or_text(path, stored)
            for number, (done, text) in enumerate(found):
                if progress and number % REPORT_EVERY == 0:
                    progress(before + done, total)
                yield text
        before += os.path.getsize(path)
    if progress:
        progress(total, total)


def _lines_or_text(path: str, stored: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """Yield (bytes of the file read, document)."""
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
    if path.endswith(".zst"):
        damage = (EOFError, library("zstandard", path).ZstdError)
    try:
        for text in _split(path, _decompressed(path, stored)):
            yield stored.tell(), text
    except damage as error:
        raise DataError(f"{path}: damaged compressed file ({error})") from error


def _decompressed(path: str, stored: io.BufferedReader) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)
    if path.endswith(".zst"):
        return io.BufferedReader(_Zst(path, stored), CHUNK)
    return lzma.LZMAFile(stored) if path.endswith(".xz") else stored


class _Zst(io.RawIOBase):
    """The text of .zst frames, one after another; the library's own reader takes a cut file for a whole one."""

    def __init__(self, path: str, stored: io.BufferedReader) -> None:
        self._library, self._stored = library("zstandard", path), stored
        self._frame: Any = None
        self._packed = self._text = b""

    def readable(self) -> bool:
        """Return True, which io.BufferedReader asks for."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as what is unpacked goes and return the bytes; EOFError in the middle of a frame."""
        while not self._text:
            self._packed = self._packed or self._stored.read(ZST_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends before the end of its last frame")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            self._text = self._frame.decompress(self._packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def _parquet(path: str, stored: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """Yield (share of the rows read, in bytes of the file; document), a few rows and a page of the file at a time."""
    parquet, arrow = library("pyarrow.parquet", path), library("pyarrow", path)
    size = os.fstat(stored.fileno()).st_size
    try:
        file = parquet.ParquetFile(stored, buffer_size=CHUNK, page_checksum_verification=True)
        names = file.schema_arrow.names
        kind = file.schema_arrow.field("text").type if names.count("text") == 1 else None
        if kind not in (arrow.string(), arrow.large_string()):
            raise DataError(f'{path}: expected one column of strings named "text", got {", ".join(names)[:200]}')
        row, rows = 0, file.metadata.num_rows
        for batch in file.iter_batches(PARQUET_ROWS, columns=["text"], use_threads=False):
            for value in batch.column(0):
                row += 1
                if not value.is_valid:
                    raise DataError(f"{path}: row {row}: text: expected a string, got null")
                if value.as_buffer().size > MAX_DOCUMENT:
                    raise DataError(f"{path}: row {row}: text is over {MAX_DOCUMENT} bytes; split the document")
                yield size * row // rows, value.as_py()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged parquet file ({reason})") from error


def _split(path: str, file: io.BufferedIOBase) -> Iterator[str]:
    jsonl = path.endswith(tuple(f".jsonl{packed}" for packed in PACKED))
    return _jsonl(path, file) if jsonl else _text(path, file)


def _jsonl(path: str, file: io.BufferedIOBase) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            raise DataError(f"{path}:{number}: line over {MAX_DOCUMENT} bytes; split the document")
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{path}:{number}: expected an object with a string "text"')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path}:{number}: text: not valid Unicode: {error.reason}") from error
        yield text


def _text(path: str, file: io.BufferedIOBase) -> Iterator[str]:
    number, rest = 1, b""
    while chunk := file.read(CHUNK):
        *whole, rest = (rest + chunk).split(b"\f")
        for document in whole:
            yield _decode(path, number, document)
            number += 1
        if len(rest) > MAX_DOCUMENT:
            raise DataError(
                f"{path}: document {number} is over {MAX_DOCUMENT} bytes; separate documents by form feeds, or give "
                "JSON lines"
            )
    yield _decode(path, number, rest)


def _decode(path: str, number: int, document: bytes) -> str:
    try:
        return document.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: document {number}: not UTF-8: {error}") from error
