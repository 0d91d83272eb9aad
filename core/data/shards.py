"""The official shard format (docs/challenge.md, 3), and documents streamed into it.

256 little-endian int32 (magic 20240520, version 1, token count, the rest ignored), then `count` uint16 tokens. Of a
vocabulary that uint16 cannot number the tokens are int32, behind a magic of our own.
"""

import hashlib
import io
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from core.data.column import Column
from core.data.column import DataError as DataError
from core.data.tokenizer import Tokenizer, token_bytes
from core.files import append_file, edit_file, open_file, open_input, replace_file

MAGICS = {"<u2": 20240520, "<i4": 20261124}
"""Type of the tokens -> the number that a shard of them begins with; the second is ours."""
MAGIC = MAGICS["<u2"]
VERSION = 1
HEADER_BYTES = 1024
ENCODE_BYTES = 1 << 22
"""Text that is encoded at once."""


def shard_type(vocab: int) -> str:
    """Return the type of the tokens in shards of a vocabulary: uint16 where it numbers them all, else int32."""
    return "<u2" if vocab <= 1 << 16 else "<i4"


def open_shard(path: str, sha256: str | None = None, dtype: str = "<u2") -> Column:
    """Return the tokens of a shard, (count,) of a type of MAGICS, that are read from it when they are asked for.

    `sha256` is what `verify` holds the file to. DataError names the field that is wrong.
    """
    with open_input(path) as file:
        return _tokens(path, file, sha256, dtype)


def _tokens(path: str, file: BinaryIO, sha256: str | None, dtype: str) -> Column:
    header = file.read(HEADER_BYTES)
    size = os.fstat(file.fileno()).st_size
    if len(header) < HEADER_BYTES:
        raise DataError(
            f"{path}: header: {len(header)} bytes, expected {HEADER_BYTES}; the file is cut off or no shard"
        )
    magic, version, count = struct.unpack_from("<3i", header)
    other = next((known for known, number in MAGICS.items() if number == magic != MAGICS[dtype]), None)
    if other is not None:
        what = f"tokens of type {other}, expected {dtype} for the vocabulary of this tokenizer"
        raise DataError(f"{path}: magic: {magic}: {what}; the shards were made with another one")
    if magic != MAGICS[dtype]:
        raise DataError(f"{path}: magic: {magic}, expected {MAGICS[dtype]}; this is not a token shard")
    if version != VERSION:
        raise DataError(f"{path}: version: {version}, expected {VERSION}")
    if count < 1:
        raise DataError(f"{path}: count: {count} tokens, expected at least 1")
    expected = HEADER_BYTES + np.dtype(dtype).itemsize * count
    if size != expected:
        raise DataError(f"{path}: size: {size} bytes, expected {expected} for {count} tokens; the file is damaged")
    return Column(path, file, dtype, HEADER_BYTES, count, sha256)


def write_shard(path: str, tokens: np.ndarray, dtype: str = "<u2") -> None:
    """Write (count,) token ids that fit a type of MAGICS as a shard: to a temporary name, fsynced, renamed."""
    most = np.iinfo(dtype).max
    if not tokens.size or tokens.min() < 0 or tokens.max() > most:
        raise DataError(f"{path}: expected at least one token id, all from 0 to {most}")
    replace_file(path, _header(tokens.size, dtype) + tokens.astype(dtype).tobytes())


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_record(path: str, count: int) -> dict[str, Any]:
    """Return the manifest's entry of a shard of `count` tokens."""
    return {"file": os.path.basename(path), "tokens": count, "size": os.path.getsize(path), "sha256": file_sha256(path)}


class SplitWriter:
    """Documents that are tokenised into `<name>_%06d.bin` in a folder, each BOS and its tokens; nothing is held.

    Their raw bytes go into a .npy beside the shards.
    """

    def __init__(self, folder: str, name: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._name, self._tokenizer = folder, name, tokenizer
        self._dtype = shard_type(tokenizer.vocab)
        self._shards = _ShardWriter(folder, name, shard_tokens, self._dtype)
        self._lengths = array("q")
        self._tokens = self._table_bytes = self._unknown = 0

    def add(self, texts: Sequence[str], threads: int) -> None:
        """Tokenise documents, each of which has tokens."""
        pieces, bos = [], np.array([self._tokenizer.bos], np.int32)
        for text, ids in zip(texts, self._tokenizer.encode_batch(texts, threads), strict=True):
            self._lengths.append(len(text.encode()))
            pieces += [bos, ids]
        if pieces:
            stream = np.concatenate(pieces)
            self._tokens += stream.size
            charged = token_bytes(self._tokenizer.table, stream[:-1], stream[1:])
            self._table_bytes += int(charged.sum(dtype=np.int64))
            self._unknown += int(np.count_nonzero(stream == self._tokenizer.unknown))
            self._shards.add(stream.astype(self._dtype))

    def close(self) -> dict[str, Any]:
        """Finish the files and return the split's entry of the manifest, `documents` of which may be 0."""
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._lengths, "<i8"), allow_pickle=False)
        replace_file(os.path.join(self._folder, f"{self._name}_document_bytes.npy"), buffer.getvalue())
        size = sum(self._lengths)
        return {
            "files": self._shards.close(),
            "documents": len(self._lengths),
            "tokens": self._tokens,
            "raw_bytes": size,
            "table_bytes": self._table_bytes,
            "unknown_tokens": self._unknown,
            "bytes_per_token": size / max(self._tokens, 1),
            "document_bytes": f"{self._name}_document_bytes.npy",
        }


def grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of documents of about ENCODE_BYTES together."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _header(count: int, dtype: str = "<u2") -> bytes:
    return struct.pack("<3i", MAGICS[dtype], VERSION, count).ljust(HEADER_BYTES, b"\0")


class _ShardWriter:
    """A stream of tokens cut into shards of `limit` tokens; nothing is held but the tokens being added."""

    def __init__(self, folder: str, name: str, limit: int, dtype: str) -> None:
        self._folder, self._name, self._limit, self._dtype = folder, name, limit, dtype
        self._count = 0
        self._files: list[dict[str, Any]] = []

    def add(self, tokens: np.ndarray) -> None:
        """Append (count,) tokens to the stream."""
        while tokens.size:
            piece, tokens = np.split(tokens, [self._limit - self._count])
            with append_file(self._path()) as file:
                if self._count == 0:
                    file.write(_header(0, self._dtype))
                file.write(piece.tobytes())
            self._count += piece.size
            if self._count == self._limit:
                self._finish()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard and return the manifest's entries of all."""
        if self._count:
            self._finish()
        return self._files

    def _path(self) -> str:
        return os.path.join(self._folder, f"{self._name}_{len(self._files):06d}.bin")

    def _finish(self) -> None:
        path = self._path()
        with edit_file(path) as file:
            file.write(_header(self._count, self._dtype))
            file.flush()
            os.fsync(file.fileno())
        self._files.append(shard_record(path, self._count))
        self._count = 0
