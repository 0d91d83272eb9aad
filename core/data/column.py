"""One row of numbers in a file, read by position: nothing is mapped, so a file that is cut is an error and no signal.

All columns of a process share a bounded pool of open files, so that any number of shards needs few descriptors.
"""

import hashlib
import itertools
import os
import threading
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np

from core.files import open_file

MOST_OPEN = 64
"""Files of columns that a process holds open."""
CHUNK = 1 << 20
"""Bytes hashed at once."""
PIECE = 1 << 30
"""Bytes asked of the system at once: more than 2^31 - 1 are cut short."""

_open: OrderedDict[int, int] = OrderedDict()
"""Descriptors by the number of their column, the last used one last."""
_numbers = itertools.count()
_lock = threading.Lock()
"""Held while a file of the pool is read: another thread may not close it then."""


class DataError(ValueError):
    """Data that cannot be used: the message names the file and the field."""


class Column:
    """(count,) numbers of one type in a regular file from a byte on: len(), slices, and the whole as an array.

    DataError names the file if it is no longer what it was when the column was made: cut, replaced or written to.
    """

    def __init__(
        self, path: str, file: BinaryIO, dtype: str, offset: int, count: int, sha256: str | None = None
    ) -> None:
        """Describe a column of the open `file`, which lies at `path`, holds all of it and should have that checksum."""
        self.path, self.dtype = path, np.dtype(dtype)
        self._offset, self._count = offset, count
        self._sha256, self._verified = sha256, sha256 is None
        self._stamp, self._number = _stamp(os.fstat(file.fileno())), next(_numbers)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the numbers of a slice of step 1."""
        begin, stop, _ = part.indices(self._count)
        return self.read(begin, max(stop - begin, 0))

    def read(self, begin: int, count: int) -> np.ndarray:
        """Return `count` numbers from one on, all of which are there."""
        size = self.dtype.itemsize
        return np.frombuffer(self._read(self._offset + size * begin, size * count), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all the numbers."""
        return np.array(self[:], dtype)

    def close(self) -> None:
        """Give back the open file; reading opens it again."""
        with _lock:
            handle = _open.pop(self._number, None)
            if handle is not None:
                os.close(handle)

    def verify(self) -> None:
        """Compare the file with its checksum, if one is known, once; DataError."""
        if self._verified:
            return
        digest = hashlib.sha256()
        with open_file(self.path) as file:
            self._check(os.fstat(file.fileno()))
            while chunk := file.read(CHUNK):
                digest.update(chunk)
            self._check(os.fstat(file.fileno()))
        if digest.hexdigest() != self._sha256:
            raise DataError(
                f"{self.path}: sha256: not what the manifest says, so it has changed since it was made: prepare or "
                "fetch the data again"
            )
        self._verified = True

    def _check(self, status: os.stat_result) -> None:
        """Raise DataError unless an open file is the one that the column was made of, unchanged."""
        now = _stamp(status)
        if now != self._stamp:
            size = f"{self._stamp[0]:,} bytes before, {now[0]:,} now" if now[0] != self._stamp[0] else "written to"
            raise DataError(f"{self.path}: has changed while it was in use ({size}); leave the data alone, begin again")

    def _read(self, offset: int, size: int) -> bytes:
        with _lock:
            handle = _open.get(self._number)
            if handle is None:
                with open_file(self.path) as file:
                    handle = _open[self._number] = os.dup(file.fileno())
                while len(_open) > MOST_OPEN:
                    os.close(_open.popitem(last=False)[1])
            else:
                _open.move_to_end(self._number)
            status = os.fstat(handle)
            if (status.st_size, status.st_mtime_ns) != self._stamp[:2] or status.st_ino != self._stamp[2]:
                self._check(status)
            data = os.pread(handle, min(size, PIECE), offset)
            while len(data) < size:
                more = os.pread(handle, min(size - len(data), PIECE), offset + len(data))
                if not more:
                    self._check(os.fstat(handle))
                    raise DataError(f"{self.path}: ends before byte {offset + size}; the file is damaged")
                data += more
        return data


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
