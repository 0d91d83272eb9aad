"""Documents out of text files, one at a time: .txt and .jsonl, each also .gz and .xz."""

import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence

from core.shards import DataError

MAX_DOCUMENT = 1 << 24
"""Bytes of the longest document, or JSON line, that is accepted: encoding one takes about 60 times its size."""
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz")
CHUNK = 1 << 20
REPORT_EVERY = 64


def document_hash(text: str) -> bytes:
    """Return the 16 bytes that stand for a document when splits are compared (blake2b of its UTF-8)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def check_inputs(paths: Sequence[str]) -> None:
    """Raise DataError unless every path is a file of a known kind."""
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file")
        if not path.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; expected a name that ends in {', '.join(SUFFIXES)}")


def read_documents(paths: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """Yield the text of every document, in order; DataError names the file and the line or document.

    .jsonl: one object with a "text" a line, empty lines are skipped. .txt: one document a file, or several separated
    by form feeds. `progress` gets the bytes read so far and in all, as stored on disk.
    """
    total = sum(map(os.path.getsize, paths))
    before = 0
    for path in paths:
        with open(path, "rb") as stored:
            try:
                for number, text in enumerate(_split(path, _decompressed(path, stored))):
                    if progress and number % REPORT_EVERY == 0:
                        progress(before + stored.tell(), total)
                    yield text
            except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
                raise DataError(f"{path}: damaged compressed file ({error})") from error
            before += stored.tell()
    if progress:
        progress(total, total)


def _decompressed(path: str, stored: io.BufferedReader) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)
    return lzma.LZMAFile(stored) if path.endswith(".xz") else stored


def _split(path: str, file: io.BufferedIOBase) -> Iterator[str]:
    plain = path.removesuffix(".gz").removesuffix(".xz")
    return _jsonl(path, file) if plain.endswith(".jsonl") else _text(path, file)


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
