"""The file of a ledger: a header, then one record per write, appended and never changed.

Header: b"SKCLEDGR", uint32 length, JSON {"schema", "tokens", "key"}. Record: RECORD, then (start, stop, row, version)
uint32 of every range of consecutive targets that adapters of one row scored at one version, then the nats of those
targets, float64. All little-endian. A kill can cut the last record short; it is dropped then. Anything else that does
not fit is an error that names the place; schema 1, without rows, is not read.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from core.files import FileError, edit_file, locked, naming, open_file, replace_file

MAGIC = b"SKCLEDGR"
SCHEMA = 2
MAX_HEADER = 4096
MAX_TARGETS = 2**28
RECORD = struct.Struct("<4s5I")
"""b"SCOR", ranges, targets, number of the write, CRC-32 of ranges and nats, CRC-32 of these fields."""
MARK = b"SCOR"


class LedgerError(ValueError):
    """A rule of the ledger was broken, or its file is damaged."""

    def __init__(self, message: str, rule: str | None = None) -> None:
        super().__init__(message)
        self.rule = rule
        """The rule of the challenge that was broken (core/audit/rules.py); None: another fault."""


class InUseError(LedgerError):
    """Another process is writing to the ledger."""


class Journal:
    """An open ledger file, of one evaluation and with one writer."""

    def __init__(self, path: Path, file: BinaryIO, tokens: int, key: str, begin: int) -> None:
        self.path, self.tokens, self.key = path, tokens, key
        self._file, self._begin, self._order = file, begin, 0

    @classmethod
    def open(cls, path: str | Path, tokens: int, key: str) -> "Journal":
        """Open a file for more records, or begin it; LedgerError if it is another evaluation's or in use."""
        path = Path(path)
        if not os.path.lexists(path):
            text = json.dumps({"schema": SCHEMA, "tokens": tokens, "key": key}, sort_keys=True).encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, MAGIC, len(text).to_bytes(4, "little"), text)
        with _of_a_ledger():
            file = edit_file(path)
            if not locked(file):  # gone with the process, whatever ends it
                file.close()
                raise InUseError(f"{path}: another evaluation is writing to it: wait for it, or stop it")
        journal = cls._opened(path, file)
        if (journal.tokens, journal.key) != (tokens, key):
            file.close()
            raise LedgerError(
                f"{path}: holds another evaluation (other weights, text or settings: key {journal.key[:12]}, this one "
                f"is {key[:12]}): give another file, or delete it to begin anew"
            )
        return journal

    @classmethod
    def read(cls, path: str | Path) -> "Journal":
        """Open a file to look at it."""
        with _of_a_ledger():
            file = open_file(path)
        return cls._opened(Path(path), file)

    @classmethod
    def _opened(cls, path: Path, file: BinaryIO) -> "Journal":
        with naming(path):
            head = file.read(len(MAGIC) + 4)
            length = int.from_bytes(head[len(MAGIC) :], "little")
            text = file.read(length) if head[: len(MAGIC)] == MAGIC and length <= MAX_HEADER else b""
        try:
            value = json.loads(text)
            tokens, key = value["tokens"], value["key"]
            good = value["schema"] == SCHEMA and type(tokens) is int and 2 <= tokens <= MAX_TARGETS + 1
            good = good and re.fullmatch("[ -~]{0,200}", key)
        except (ValueError, KeyError, TypeError, RecursionError):
            good, tokens, key = False, 0, ""
        if not good:
            file.close()
            _fail(path, "header", "not a ledger, or one of another version")
        return cls(path, file, tokens, key, file.tell())

    def records(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (positions, nats, version, row) of every write, one of each for a target.

        A last write that was cut short is left out, and cut off.
        """
        size = self._file.seek(0, 2)
        at = self._begin
        while at < size:
            self._file.seek(at)
            head = self._file.read(RECORD.size)
            if len(head) < RECORD.size:
                break
            mark, ranges, targets, order, payload_crc, head_crc = RECORD.unpack(head)
            good = mark == MARK and head_crc == zlib.crc32(head[:-4]) and ranges <= targets < self.tokens
            if not good or order != self._order + 1:
                if not any(head) and not any(self._file.read(1 << 20)):  # a power cut leaves zeros at the end
                    break
                _fail(self.path, f"write {self._order + 1}", f"its head at byte {at} is damaged")
            length = 16 * ranges + 8 * targets
            payload = self._file.read(length)
            if len(payload) < length:
                break
            if payload_crc != zlib.crc32(payload):
                _fail(self.path, f"write {order}", f"its numbers at byte {at} are damaged")
            starts, stops, rows, versions = np.frombuffer(payload, "<u4", 4 * ranges).reshape(-1, 4).astype(np.int64).T
            counts = stops - starts
            if counts.min(initial=1) < 1 or counts.sum() != targets:
                _fail(self.path, f"write {order}", "its ranges are damaged")
            positions = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(targets)
            self._order, at = order, at + RECORD.size + length
            nats = np.frombuffer(payload, "<f8", targets, 16 * ranges)
            yield positions, nats, np.repeat(versions, counts), np.repeat(rows, counts)
        if self._file.writable():
            self._file.truncate(at)
            self._file.seek(at)

    def append(self, positions: np.ndarray, nats: np.ndarray, version: np.ndarray, row: np.ndarray) -> None:
        """Write one record."""
        first, last = cuts(positions, version, row)
        ranges = np.stack([positions[first], positions[last] + 1, row[first], version[first]], 1).astype("<u4")
        payload = ranges.tobytes() + np.asarray(nats, "<f8").tobytes()
        head: tuple[Any, ...] = (MARK, len(ranges), len(positions), self._order + 1, zlib.crc32(payload))
        packed = RECORD.pack(*head, 0)[:-4]
        with naming(self.path):
            self._file.write(packed + zlib.crc32(packed).to_bytes(4, "little") + payload)
            self._file.flush()
        self._order += 1

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the file; what was written is on the disk then."""
        try:
            if self._file.writable():
                self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def cuts(positions: np.ndarray, *marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last index of every range of consecutive positions in which no mark changes."""
    new = np.flatnonzero((np.diff(positions) != 1) | np.any([np.diff(mark) != 0 for mark in marks], axis=0)) + 1
    return np.append(0, new), np.append(new, len(positions)) - 1


@contextmanager
def _of_a_ledger() -> Iterator[None]:
    """Let what is wrong with the file be wrong with the ledger."""
    try:
        yield
    except FileError as error:
        raise LedgerError(f"{error}; give another file, or delete it to begin anew") from error


def _fail(path: Path, field: str, problem: str) -> NoReturn:
    raise LedgerError(f"{path}: {field}: {problem}; delete it to begin anew")
