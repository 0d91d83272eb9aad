"""Tokenised text: prepared folders, documents, and batches as a pure function of the step.

`core/data/prepare.py` writes the folders that `open_dataset` opens.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.data.column import Column
from core.data.manifest import CURE, MANIFEST, read_manifest
from core.data.shards import DataError as DataError
from core.data.shards import open_shard as open_shard
from core.data.shards import shard_type
from core.data.shards import write_shard as write_shard
from core.data.tokenizer import Tokenizer, token_bytes
from core.files import FileError, note_input, open_input
from core.formats.npy import NpyError, read_header

SMALL = 1 << 24
"""Tokens of a stream that is compared with its checksums at once: a tenth of a second."""
SCAN = 1 << 24
"""Tokens that a scan of the whole stream holds at once."""


class Split:
    """One stream of tokens over several shards, with the documents in it; ids are checked when they are read."""

    unknown_tokens: int | None
    """How many tokens are the unknown id; None if not recorded."""
    sidecar: "Split | None"
    """What each token costs in bytes, where that is recorded; else the tokenizer's table says it."""

    def __init__(
        self,
        shards: Sequence[np.ndarray | Column],
        tokenizer: Tokenizer,
        name: str = "split",
        *,
        document_bytes: np.ndarray | Column | None = None,
        raw_bytes: int | None = None,
        unknown_tokens: int | None = None,
        sidecar: "Split | None" = None,
    ) -> None:
        """Make one stream of shards; `sidecar`: as many numbers, the bytes of each token, where these came along."""
        self._shards = list(shards)
        self._closed: str | None = None
        self._check: threading.Thread | None = None
        self._wrong: Exception | None = None
        self._ends = list(itertools.accumulate(map(len, self._shards)))
        self._begins = [0, *self._ends[:-1]]
        self.tokenizer = tokenizer
        self.name = name
        self._lengths, self._raw_bytes = document_bytes, raw_bytes
        self.unknown_tokens = unknown_tokens
        self.sidecar = sidecar

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start to stop as (stop - start,) int32; DataError for an id outside the vocabulary."""
        return self._checked(self.unchecked(start, stop))

    def unchecked(self, start: int, stop: int) -> np.ndarray:
        """Return numbers start to stop as they are, (stop - start,) int32: a sidecar's are no ids."""
        out = np.empty(max(stop - start, 0), np.int32)
        self._copy(start, out)
        return out

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` tokens from each start as (len(starts), length) int32; DataError as in `read`."""
        if self._wrong is not None:
            raise self._wrong
        out = np.empty((len(starts), length), np.int32)
        for row, start in zip(out, np.asarray(starts).tolist(), strict=True):
            self._copy(start, row)
        return self._checked(out)

    def costs(self, start: int, stop: int) -> np.ndarray:
        """Return the bytes that tokens start to stop cost as targets, (stop - start,) int32; DataError as in `read`."""
        if self.sidecar is not None:
            return self.sidecar.unchecked(start, stop)
        table, escapes = self.tokenizer.table, self._escapes(start) if self.tokenizer.table.markers else 0
        before = max(start - 1, 0) - (escapes > 0 and escapes % 2 == 0)  # from an escape that is not itself escaped
        stream = self.read(before, stop)
        charged = token_bytes(table, stream[:-1], stream[1:])
        return charged[start - before - 1 :] if start else np.append(table.base[stream[:1]], charged)

    def _escapes(self, stop: int) -> int:
        """Return how many of the tokens before `stop` are escapes, without any other token in between."""
        begin, escape = stop, self.tokenizer.table.markers[-1]
        while begin:
            block = self.read(max(begin - SCAN, 0) if begin < stop else begin - 1, begin)
            others = np.flatnonzero(block != escape)
            if others.size:
                return stop - begin + len(block) - 1 - int(others[-1])
            begin -= len(block)
        return stop

    def close(self, why: str) -> None:
        """Drop the shards: from here on every read is a DataError that says `why`. Lengths stay known.

        DataError if what `start_verify` began finds a shard that is not as it was made.
        """
        if self._check is not None:
            self._check.join()
        if self._wrong is not None:
            raise self._wrong
        for shard in [*self._shards, *(self.sidecar._shards if self.sidecar else [])]:
            if isinstance(shard, Column):
                shard.close()
        self._shards, self._closed = [], why

    @functools.cached_property
    def document_bytes(self) -> np.ndarray | None:
        """(documents,) int64: UTF-8 bytes of each document's text; None where the data does not say (official shards).

        DataError unless they add up to what the manifest says.
        """
        if self._lengths is None:
            return None
        lengths = np.asarray(self._lengths)
        if self._raw_bytes is not None and (lengths.min(initial=0) < 0 or lengths.sum() != self._raw_bytes):
            raise DataError(
                f"{self.name}: document_bytes: {lengths.sum()} in all, the manifest says {self._raw_bytes}; the file "
                "is damaged: prepare the data again"
            )
        return lengths

    def verify(self) -> None:
        """Compare every shard with its checksum, once; DataError names one that is not as it was made.

        Shards whose checksum is not known are taken as they are.
        """
        self._check_open()
        for shard in [*self._shards, *(self.sidecar._shards if self.sidecar else [])]:
            if isinstance(shard, Column):
                shard.verify()

    def start_verify(self) -> None:
        """Do the same: at once where it takes no time, else on a thread, whose error later calls of `gather` raise.

        `close` waits for the thread.
        """
        if len(self) <= SMALL:
            self.verify()
            return
        self._check = threading.Thread(target=self._verify_aside, name="verify", daemon=True)
        self._check.start()

    def _verify_aside(self) -> None:
        try:
            self.verify()
        except (OSError, ValueError) as error:
            self._wrong = error

    def documents(self, count: int) -> "Split":
        """Return the stream of the first `count` documents."""
        self._check_open()
        stop = int(self.document_starts[count]) if count < len(self.document_starts) else len(self)
        lengths = None if self.document_bytes is None else self.document_bytes[:count]
        first = Split(
            self._shards, self.tokenizer, self.name, document_bytes=lengths, unknown_tokens=self.unknown_tokens,
            sidecar=self.sidecar,
        )  # fmt: skip
        first._ends = [min(end, stop) for end in self._ends]
        return first

    def changed(
        self, start: int, stop: int, place: int | np.ndarray | None = None, token: int | np.ndarray = 0
    ) -> "Split":
        """Return tokens start to stop as a stream of their own, with another token at `place`, or at several."""
        tokens = self.read(start, stop)
        if place is not None:
            tokens[place] = token
        return Split([tokens], self.tokenizer, self.name)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise DataError(f"{self.name}: is closed: {self._closed}")

    def _copy(self, start: int, out: np.ndarray) -> None:
        self._check_open()
        stop = start + len(out)
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"{self.name}: tokens {start} to {stop} are outside the stream of {len(self)}")
        shard, done = bisect.bisect_right(self._ends, start), 0
        while start < stop:
            tokens, begin = self._shards[shard], start - self._begins[shard]
            count = min(stop, self._ends[shard]) - start
            piece = tokens.read(begin, count) if isinstance(tokens, Column) else tokens[begin : begin + count]
            out[done : done + count] = piece
            start, done, shard = start + count, done + count, shard + 1

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise DataError(
                f"{self.name}: token id {wrong} is outside the vocabulary of {self.tokenizer.vocab}: "
                "the shards were made with another tokenizer"
            )
        return tokens

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """(documents,) int64 positions of BOS; DataError if the stream does not start with one, or some are missing."""
        bos = self.tokenizer.bos
        if not len(self) or self.read(0, 1)[0] != bos:
            raise DataError(
                f"{self.name}: the stream does not start with BOS (id {bos}), so its documents are unknown; "
                "prepare it again with a BOS in front of each document"
            )
        pieces = [
            np.flatnonzero(self.read(start, min(start + SCAN, len(self))) == bos) + start
            for start in range(0, len(self), SCAN)
        ]
        starts = np.concatenate(pieces)
        if self._lengths is not None and len(self._lengths) != len(starts):
            raise DataError(
                f"{self.name}: document_bytes: {len(self._lengths)} documents, but the shards hold {len(starts)}"
            )
        return starts


@dataclass(frozen=True)
class Dataset:
    """A prepared folder: its tokenizer, its manifest and both streams."""

    path: str
    name: str
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    train: Split
    val: Split


def identity(dataset: Dataset) -> dict[str, str]:
    """Return what names the data of a run: its name and a hash of what the manifest says of its files."""
    files = dataset.manifest["splits"]
    if dataset.tokenizer.transform != "none":
        files = {**files, "transform": dataset.tokenizer.transform}
    splits = json.dumps(files, sort_keys=True).encode()
    return {"name": dataset.name, "sha256": hashlib.sha256(splits).hexdigest()}


def open_dataset(path: str, train: bool = True) -> Dataset:
    """Open a folder that `skc data` wrote; DataError names the file and the field that is missing or wrong.

    Without `train` the training shards stay closed, as an evaluation wants it, and its split is empty.
    """
    manifest = read_manifest(path)
    note_input(os.path.join(path, MANIFEST))
    entry, splits = manifest["tokenizer"], manifest["splits"]
    file = os.path.join(path, entry["file"])
    tokenizer = Tokenizer.load(file)
    if tokenizer.sha256 != entry["sha256"]:
        raise DataError(f"{file}: sha256: not the tokenizer of the manifest; prepare the data again")
    transform = manifest.get("transform") or "none"
    if tokenizer.transform != transform:
        raise DataError(
            f"{os.path.join(path, MANIFEST)}: transform: {transform}, but its tokenizer is for text with transform "
            f"{tokenizer.transform}; prepare the data again"
        )
    text = _open_split(path, splits["train"], "train", tokenizer) if train else Split([], tokenizer, f"{path}/train")
    val = _open_split(path, splits["val"], "val", tokenizer)
    return Dataset(path, manifest["name"], tokenizer, manifest, text, val)


def _open_shards(path: str, records: list[dict[str, Any]], dtype: str = "<u2") -> list[np.ndarray | Column]:
    shards: list[np.ndarray | Column] = []
    for record in records:
        file = os.path.join(path, record["file"])
        try:
            shard = open_shard(file, record.get("sha256"), dtype)
        except FileNotFoundError as error:
            raise DataError(f"{file}: missing, but the manifest lists it; prepare the data again") from error
        if len(shard) != record["tokens"]:
            raise DataError(f"{file}: count: {len(shard)} tokens, the manifest says {record['tokens']}")
        shards.append(shard)
    return shards


def _open_split(path: str, entry: dict[str, Any], name: str, tokenizer: Tokenizer) -> Split:
    shards, sidecar = _open_shards(path, entry["files"], shard_type(tokenizer.vocab)), None
    if entry.get("token_bytes") is not None:
        sidecar = Split(_open_shards(path, entry["token_bytes"]), tokenizer, os.path.join(path, f"{name} bytes"))
        if len(sidecar) != sum(map(len, shards)):
            raise DataError(f"{sidecar.name}: {len(sidecar)} numbers, {sum(map(len, shards))} tokens; {CURE}")
    lengths = None
    if entry.get("document_bytes") is not None:
        lengths = _open_lengths(os.path.join(path, entry["document_bytes"]), sum(map(len, shards)))
    whole = lengths is not None and len(lengths) == entry.get("documents")
    return Split(
        shards, tokenizer, os.path.join(path, name), document_bytes=lengths,
        raw_bytes=entry.get("raw_bytes") if whole else None, unknown_tokens=entry.get("unknown_tokens"),
        sidecar=sidecar,
    )  # fmt: skip


def _open_lengths(path: str, tokens: int) -> Column:
    """Return a .npy of (documents,) int64 as numpy writes it; it cannot claim more than the file or the text holds."""
    try:
        with open_input(path) as file:
            header = read_header(file)
            begin, size = file.tell(), os.fstat(file.fileno()).st_size
            if header.type != "<i8" or len(header.shape) != 1:
                raise NpyError(f"expected one row of int64, got {header.type}, {len(header.shape)} dimensions")
            if size != begin + 8 * header.shape[0]:
                raise NpyError(f"{size} bytes, expected {begin + 8 * header.shape[0]} for {header.shape[0]} documents")
            if header.shape[0] > tokens:
                raise NpyError(f"{header.shape[0]} documents in {tokens} tokens")
            return Column(path, file, "<i8", begin, header.shape[0])
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, but the manifest lists it; prepare the data again") from error
    except (NpyError, FileError) as error:
        raise DataError(f"{path}: document_bytes: {error}; prepare the data again") from error
