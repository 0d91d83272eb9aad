"""Documents out of files, one at a time: .txt and .jsonl, each also .gz, .xz and .zst, and .parquet."""

import codecs
import glob
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

from core.data.column import DataError
from core.files import MARKS, FileError, bound_values, open_file

MAX_DOCUMENT = 1 << 24
"""Bytes of the longest document, or JSON line, that is accepted: encoding one takes about 60 times its size."""
PACKED = ("", ".gz", ".xz", ".zst")
SUFFIXES = (*(f"{kind}{packed}" for packed in PACKED for kind in (".txt", ".jsonl")), ".parquet")
LIBRARIES = {".zst": "zstandard", ".parquet": "pyarrow.parquet"}
"""Suffix -> the optional module that reads it."""
COLUMNS = ("text", "content", "raw_content")
"""Where the text of a JSON line or a parquet row is looked for, in this order."""
BLANK_LINES = re.compile(rb"\n[ \t\r]*\n\s*|\f")
CHUNK = 1 << 20
ZST_CHUNK = 1 << 10
"""Compressed bytes that are unpacked at once: 1 KiB of zstd can hold up to 32 MiB of text."""
PARQUET_ROWS = 64
REPORT_EVERY = 64


class Format(NamedTuple):
    """How documents lie in files."""

    column: str | None = None
    """Key of a JSON line, or column of a parquet file, that holds the text; None: the first of COLUMNS."""
    split: Literal["files", "blank-lines"] = "files"
    """What separates documents of a .txt: form feeds alone, or blank lines too."""


PLAIN = Format()


def library(module: str, what: str) -> Any:
    """Import an optional module; DataError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        command = "pip install -c constraints.txt -e '.[data]'"
        raise DataError(f"{what} needs {package}, which is not installed; run: {command}") from error


def find_inputs(paths: Sequence[str]) -> list[str]:
    """Return the files that are meant: those of folders and of patterns in the order of their names.

    DataError unless each is a regular file of a known kind, for which the library is there.
    """
    inputs = []
    for path in paths:
        if os.path.isdir(path):
            names = [os.path.join(place, name) for place, _, files in os.walk(path) for name in files]
            names = sorted(name for name in names if name.endswith(SUFFIXES) and not _hidden(name, path))
            if not names:
                raise DataError(f"{path}: no file in this folder has a name that ends in {', '.join(SUFFIXES)}")
        elif glob.has_magic(path) and not os.path.lexists(path):
            names = sorted(name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
            if not names:
                raise DataError(f"{path}: no file fits this pattern")
        else:
            names = [path]
        inputs += names
    for path in inputs:
        _check_input(path)
    return inputs


def _hidden(name: str, folder: str) -> bool:
    return any(part.startswith(".") for part in os.path.relpath(name, folder).split(os.sep))


def _check_input(path: str) -> None:
    try:
        open_file(path).close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such file") from error
    if not path.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; expected a name that ends in {', '.join(SUFFIXES)}")
    for suffix, module in LIBRARIES.items():
        if path.endswith(suffix):
            library(module, f"{path}: a {suffix} file")


def read_documents(
    paths: Sequence[str], progress: Callable[[int, int], None] | None = None, form: Format = PLAIN
) -> Iterator[str]:
    """Yield the text of every document, in order; DataError names the file and the line, row or document.

    .jsonl: one object a line, whose text is under `form.column`; empty lines are skipped. .txt: one document a file, or
    several separated as `form.split` says. .parquet: the rows of a column. `progress` gets the bytes read so far and in
    all, as stored on disk.
    """
    total = sum(map(os.path.getsize, paths))
    before = 0
    for path in paths:
        with open_file(path) as stored:
            packed = path.endswith(".parquet")
            documents = _parquet(path, stored, form.column) if packed else _lines_or_text(path, stored, form)
            for number, (done, text) in enumerate(documents):
                if progress and number % REPORT_EVERY == 0:
                    progress(before + done, total)
                yield text
        before += os.path.getsize(path)
    if progress:
        progress(total, total)


def _lines_or_text(path: str, stored: BinaryIO, form: Format) -> Iterator[tuple[int, str]]:
    """Yield (bytes of the file read, document)."""
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
    if path.endswith(".zst"):
        damage = (EOFError, library("zstandard", path).ZstdError)
    try:
        for text in _split(path, _decompressed(path, stored), form):
            yield stored.tell(), text
    except damage as error:
        raise DataError(f"{path}: damaged compressed file ({error})") from error


def _decompressed(path: str, stored: BinaryIO) -> Any:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)
    if path.endswith(".zst"):
        return io.BufferedReader(_Zst(path, stored), CHUNK)
    return lzma.LZMAFile(stored) if path.endswith(".xz") else stored


class _Zst(io.RawIOBase):
    """The text of .zst frames, one after another; the library's own reader takes a cut file for a whole one."""

    def __init__(self, path: str, stored: BinaryIO) -> None:
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


def _parquet(path: str, stored: BinaryIO, column: str | None) -> Iterator[tuple[int, str]]:
    """Yield (share of the rows read, in bytes of the file; document), a few rows and a page of the file at a time."""
    parquet, arrow = library("pyarrow.parquet", path), library("pyarrow", path)
    size = os.fstat(stored.fileno()).st_size
    try:
        file = parquet.ParquetFile(stored, buffer_size=CHUNK, page_checksum_verification=True)
        names, wanted = file.schema_arrow.names, (column,) if column is not None else COLUMNS
        name = next((name for name in wanted if names.count(name) == 1), None)
        if name is None:
            raise DataError(
                f"{path}: expected one column {' or '.join(wanted)}, got {', '.join(names)[:200]}: name it by --column"
            )
        kind = file.schema_arrow.field(name).type
        plain = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if plain not in (arrow.string(), arrow.large_string(), arrow.string_view()):
            raise DataError(f"{path}: {name}: expected a column of strings, got {str(kind)[:80]}")
        row, rows = 0, file.metadata.num_rows
        for batch in file.iter_batches(PARQUET_ROWS, columns=[name], use_threads=False):
            for value in batch.column(0):
                row += 1
                value = value.value if arrow.types.is_dictionary(kind) else value
                if not value.is_valid:
                    raise DataError(f"{path}: row {row}: {name}: expected a string, got null")
                if value.as_buffer().size > MAX_DOCUMENT:
                    raise DataError(f"{path}: row {row}: {name} is over {MAX_DOCUMENT} bytes; split the document")
                yield size * row // rows, value.as_py()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged parquet file ({reason})") from error


def _split(path: str, file: Any, form: Format) -> Iterator[str]:
    jsonl = path.endswith(tuple(f".jsonl{packed}" for packed in PACKED))
    return _jsonl(path, file, form.column) if jsonl else _text(path, file, form.split == "blank-lines")


def _jsonl(path: str, file: Any, column: str | None) -> Iterator[str]:
    number, wanted = 0, (column,) if column is not None else COLUMNS
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            raise DataError(f"{path}:{number}: line over {MAX_DOCUMENT} bytes; split the document")
        if number == 1:
            line = _unmarked(path, line)
        if line.isspace() or not line:
            continue
        try:
            written = line.decode()
            bound_values(f"{path}:{number}", written)
            record = json.loads(written)
        except FileError as error:
            raise DataError(str(error)) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        text = None
        if isinstance(record, dict):
            text = next((record[name] for name in wanted if isinstance(record.get(name), str)), None)
        if not isinstance(text, str):
            raise DataError(
                f"{path}:{number}: expected an object with a string {' or '.join(wanted)}{_keys(record)}; name another "
                "key with --column"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path}:{number}: text: not valid Unicode: {error.reason}") from error
        yield text


def _keys(record: Any) -> str:
    """Return what an object of a line has instead, for a message."""
    return f", got {ascii(list(record)[:8])[:160]}" if isinstance(record, dict) else f", got {type(record).__name__}"


def _text(path: str, file: Any, blank_lines: bool) -> Iterator[str]:
    number, rest, first = 1, b"", True
    while chunk := file.read(CHUNK):
        chunk, first = _unmarked(path, chunk) if first else chunk, False
        *whole, rest = BLANK_LINES.split(rest + chunk) if blank_lines else (rest + chunk).split(b"\f")
        for document in whole:
            yield _decode(path, number, document)
            number += 1
        if len(rest) > MAX_DOCUMENT:
            raise DataError(
                f"{path}: document {number} is over {MAX_DOCUMENT} bytes; separate documents by form feeds, or make "
                "them of what lies between blank lines with --split blank-lines"
            )
    yield _decode(path, number, rest)


def _unmarked(path: str, head: bytes) -> bytes:
    """Return the first bytes of a text without a UTF-8 mark; DataError if they are of another encoding."""
    for mark, name in MARKS.items():
        if head.startswith(mark):
            raise DataError(f"{path}: is {name}, expected UTF-8: save it as UTF-8")
    start = head[:4096]
    if 0.3 * len(start) < start.count(0) < len(start):  # Latin letters in two bytes: every second one is 0
        name = "UTF-16" if start.count(0) < 0.6 * len(start) else "UTF-32"
        raise DataError(f"{path}: seems to be {name} without a mark, expected UTF-8: save it as UTF-8")
    return head.removeprefix(codecs.BOM_UTF8)


def _decode(path: str, number: int, document: bytes) -> str:
    try:
        return document.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: document {number}: not UTF-8: {error.reason} at byte {error.start}: save it as UTF-8"
        ) from error
