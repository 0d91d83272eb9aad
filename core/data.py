"""Tokenised text: prepared folders, documents, and batches as a pure function of the step.

`core/prepare.py` writes the folders that `open_dataset` opens.
"""

import functools
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from core import rng
from core.engine import Batch
from core.files import open_input
from core.shards import DataError as DataError
from core.shards import open_shard as open_shard
from core.shards import write_shard as write_shard
from core.tokenizer import Tokenizer

SCHEMA = 1
MAX_MANIFEST = 1 << 26
SCAN = 1 << 24
"""Tokens that a scan of the whole stream holds at once."""


class Split:
    """One stream of tokens over several shards, with the documents in it; ids are checked when they are read."""

    document_bytes: np.ndarray | None
    """(documents,) int64: UTF-8 bytes of each document's text; None where the data does not say (official shards)."""
    unknown_tokens: int | None
    """How many tokens are the unknown id; None if not recorded."""

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        tokenizer: Tokenizer,
        name: str = "split",
        *,
        document_bytes: np.ndarray | None = None,
        unknown_tokens: int | None = None,
    ) -> None:
        self._shards = list(shards)
        self._closed: str | None = None
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self._tokenizer = tokenizer
        self.name = name
        self.document_bytes = document_bytes
        self.unknown_tokens = unknown_tokens

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start to stop as (stop - start,) int32; DataError for an id outside the vocabulary."""
        out = np.empty(max(stop - start, 0), np.int32)
        self._copy(start, out)
        return self._checked(out)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` tokens from each start as (len(starts), length) int32; DataError as in `read`."""
        out = np.empty((len(starts), length), np.int32)
        for row, start in zip(out, np.asarray(starts).tolist(), strict=True):
            self._copy(start, row)
        return self._checked(out)

    def close(self, why: str) -> None:
        """Drop the shards: from here on every read is a DataError that says `why`. Lengths stay known."""
        self._shards, self._closed = [], why

    def documents(self, count: int) -> "Split":
        """Return the stream of the first `count` documents."""
        self._check_open()
        stop = int(self.document_starts[count]) if count < len(self.document_starts) else len(self)
        begins = self._ends - [len(shard) for shard in self._shards]
        shards = [s[: stop - b] for s, b in zip(self._shards, begins.tolist(), strict=True) if b < stop]
        lengths = None if self.document_bytes is None else self.document_bytes[:count]
        return Split(shards, self._tokenizer, self.name, document_bytes=lengths, unknown_tokens=self.unknown_tokens)

    def changed(self, start: int, stop: int, place: int | None = None, token: int = 0) -> "Split":
        """Return tokens start to stop as a stream of their own, with another token at `place`."""
        tokens = self.read(start, stop).astype("<u2")
        if place is not None:
            tokens[place] = token
        return Split([tokens], self._tokenizer, self.name)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise DataError(f"{self.name}: is closed: {self._closed}")

    def _copy(self, start: int, out: np.ndarray) -> None:
        self._check_open()
        stop = start + len(out)
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"{self.name}: tokens {start} to {stop} are outside the stream of {len(self)}")
        shard = int(np.searchsorted(self._ends, start, "right"))
        done = 0
        while done < len(out):
            tokens = self._shards[shard]
            begin = start + done - (int(self._ends[shard]) - len(tokens))
            piece = tokens[begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.size and tokens.max() >= self._tokenizer.vocab:
            raise DataError(
                f"{self.name}: token id {tokens.max()} is outside the vocabulary of {self._tokenizer.vocab}: "
                "the shards were made with another tokenizer"
            )
        return tokens

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """(documents,) int64 positions of BOS; DataError if the stream does not start with one, or some are missing."""
        bos = self._tokenizer.bos
        found = [
            np.flatnonzero(self.read(start, min(start + SCAN, len(self))) == bos) + start
            for start in range(0, len(self), SCAN)
        ]
        starts = np.concatenate([np.empty(0, np.int64), *found])
        if not starts.size or starts[0] != 0:
            raise DataError(
                f"{self.name}: the stream does not start with BOS (id {bos}), so its documents are unknown; "
                "prepare it again with a BOS in front of each document"
            )
        if self.document_bytes is not None and len(self.document_bytes) != len(starts):
            raise DataError(
                f"{self.name}: document_bytes: {len(self.document_bytes)} documents, but the shards hold {len(starts)}"
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
    splits = json.dumps(dataset.manifest["splits"], sort_keys=True).encode()
    return {"name": dataset.name, "sha256": hashlib.sha256(splits).hexdigest()}


def open_dataset(path: str, train: bool = True) -> Dataset:
    """Open a folder that `skc data` wrote; DataError names the file and the field that is missing or wrong.

    Without `train` the training shards stay closed, as an evaluation wants it, and its split is empty.
    """
    manifest = read_manifest(path)
    entry = _field(path, manifest, "tokenizer", dict)
    tokenizer = Tokenizer.load(os.path.join(path, _field(path, entry, "file", str)))
    if tokenizer.sha256 != _field(path, entry, "sha256", str):
        raise DataError(f"{path}/tokenizer.model: sha256: not the tokenizer of the manifest; prepare the data again")
    splits = _field(path, manifest, "splits", dict)
    entries = {name: _field(path, splits, name, dict) for name in ("train", "val")}
    text = _open_split(path, entries["train"], "train", tokenizer) if train else Split([], tokenizer, f"{path}/train")
    val = _open_split(path, entries["val"], "val", tokenizer)
    return Dataset(path, _field(path, manifest, "name", str), tokenizer, manifest, text, val)


def read_manifest(path: str) -> dict[str, Any]:
    """Return the manifest of a prepared folder; DataError if there is none or it is not one of ours."""
    file = os.path.join(path, "manifest.json")
    if not os.path.isfile(file):
        raise DataError(f"{path}: no manifest.json here; make the folder with `skc data prepare`")
    if os.path.getsize(file) > MAX_MANIFEST:
        raise DataError(f"{file}: over {MAX_MANIFEST} bytes; this is not a manifest")
    try:
        with open_input(file) as data:
            manifest = json.loads(data.read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}); prepare the data again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{file}: schema: {schema!r}, expected {SCHEMA}; prepare the data again")
    return manifest


def _field(path: str, parent: Any, key: str, kind: type) -> Any:
    """Return an entry of the manifest in folder `path`, which must be there and of type `kind`."""
    value = parent.get(key) if isinstance(parent, dict) else None
    if type(value) is not kind:
        raise DataError(f"{path}/manifest.json: {key}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _open_split(path: str, entry: dict[str, Any], name: str, tokenizer: Tokenizer) -> Split:
    shards = []
    for record in _field(path, entry, "files", list):
        file = os.path.join(path, _field(path, record, "file", str))
        if not os.path.isfile(file):
            raise DataError(f"{file}: missing, but the manifest lists it; prepare the data again")
        shards.append(open_shard(file))
        if len(shards[-1]) != _field(path, record, "tokens", int):
            raise DataError(f"{file}: count: {len(shards[-1])} tokens, the manifest says {record['tokens']}")
    lengths = unknown = None
    if entry.get("document_bytes") is not None:
        lengths = _read_lengths(os.path.join(path, _field(path, entry, "document_bytes", str)))
    if entry.get("unknown_tokens") is not None:
        unknown = _field(path, entry, "unknown_tokens", int)
    return Split(shards, tokenizer, os.path.join(path, name), document_bytes=lengths, unknown_tokens=unknown)


def _read_lengths(path: str) -> np.ndarray:
    """Map a .npy of (documents,) int64, as numpy writes it; its header cannot claim more than the file holds."""
    try:
        with open_input(path) as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}, expected (1, 0)")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            row = dtype == np.dtype("<i8") and len(shape) == 1
            if row and not 0 <= 8 * shape[0] <= os.fstat(file.fileno()).st_size - file.tell():
                raise ValueError(f"cut off before value {shape[0]}")
            if row:
                return np.memmap(file, dtype, "r", file.tell(), shape)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: document_bytes: not a .npy array ({error}); prepare the data again") from error
    raise DataError(f"{path}: document_bytes: expected one row of int64")


def batch(split: Split, step: int, rows: int, seq: int, seed: int, part: slice | None = None) -> Batch:
    """Return the rows of step `step`, or `part` of them: a pure function of its arguments.

    Windows of seq + 1 tokens lie on a grid of stride seq; row r of step s is window number s * rows + r. Each epoch
    visits every window once, in the order (m * i + o) mod n with m coprime to n, drawn from (seed, epoch).
    DataError if the split is shorter than one window.
    """
    windows = (len(split) - 1) // seq
    if windows < 1:
        raise DataError(
            f"{split.name}: {len(split)} tokens, shorter than one row of seq + 1 = {seq + 1}; use a smaller train.seq"
        )
    orders: dict[int, tuple[int, int]] = {}
    wanted = range(rows)[part or slice(None)]
    starts = np.empty(len(wanted), np.int64)
    for place, row in enumerate(wanted):
        epoch, i = divmod(step * rows + row, windows)
        if epoch not in orders:
            orders[epoch] = _order(seed, epoch, windows)
        multiplier, offset = orders[epoch]
        starts[place] = (multiplier * i + offset) % windows * seq
    tokens = split.gather(starts, seq + 1)
    return Batch(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), rows)


def _order(seed: int, epoch: int, windows: int) -> tuple[int, int]:
    draws = 0
    while True:
        multiplier = rng.below(seed, f"data/{epoch}/multiplier/{draws}", windows)
        if math.gcd(multiplier, windows) == 1:
            return multiplier, rng.below(seed, f"data/{epoch}/offset", windows)
        draws += 1


class Prefetch:
    """Make the batches of consecutive steps on one thread, `depth` ahead, for the row length that is in use."""

    def __init__(self, make: Callable[[int, int], Batch], first: int, seq: int, depth: int = 2) -> None:
        self._make, self._step = make, first
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()
        for i in range(depth):
            self._start(first + i, seq)

    def get(self, step: int, seq: int) -> Batch:
        """Return the batch of `step`, which must be the next one, in rows of `seq`, or raise what making it raised."""
        if step != self._step:
            raise ValueError(f"step {step} was asked of a prefetcher whose next step is {self._step}")
        guessed, made = self._ahead[0]
        batch = made.result() if guessed == seq else self._make(step, seq)  # the schedule has changed the length
        self._ahead.popleft()
        self._step += 1
        self._start(step + len(self._ahead) + 1, seq)
        return batch

    def _start(self, step: int, seq: int) -> None:
        self._ahead.append((seq, self._pool.submit(self._make, step, seq)))

    def close(self) -> None:
        """Drop what was made ahead and end the thread."""
        self._pool.shutdown(cancel_futures=True)
