"""A file of lines that another process appends to, followed by its new bytes alone."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from core.files import MAX_TEXT, open_file

BLOCK = 1 << 20
"""Bytes that are read at a time, and of the longest line: a longer one is none of a run's and is passed over."""
MARK = 64
"""Bytes before the place up to which the file was read: others there mean that the file was written anew."""


class AddedLines(NamedTuple):
    """What one look at a file found."""

    lines: list[bytes]
    """Whole lines, without their ends."""
    anew: bool
    """The file is another one than before, or was cut: the lines are those from its start."""
    more: bool
    """There is more to read at once."""


class Tail:
    """Follows one file; what was read once is read again only if the file is another one or was cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        """Inode."""
        self._stamp: tuple[int, int, int] | None = None
        """Inode, size and time at the last look: without a change nothing is opened."""
        self._place, self._mark, self._passing = 0, b"", False

    def look(self) -> AddedLines:
        """Return the whole lines that came since the last look, of a block of bytes at most.

        FileError for anything but a regular file of at most MAX_TEXT bytes, OSError. A file that is gone has no lines.
        """
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return AddedLines([], self._forget(), False)
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        if stamp == self._stamp:
            return AddedLines([], False, False)
        with open_file(self.path, MAX_TEXT) as file:
            status = os.fstat(file.fileno())  # of what was opened: the name may have changed hands
            other = self._file not in (None, status.st_ino) or status.st_size < self._place
            anew = (other or not self._goes_on(file.raw)) and self._forget()
            self._file = status.st_ino
            data = _read(file.raw, self._place, BLOCK)
        lines = self._lines(data)
        more = bool(data) and self._place < status.st_size and (b"\n" in data or len(data) == BLOCK)
        self._stamp = None if more else (status.st_ino, status.st_size, status.st_mtime_ns)
        return AddedLines(lines, anew, more)

    def _forget(self) -> bool:
        """Begin at the start of the file again; return whether anything had been read."""
        before, self._file, self._stamp = self._place, None, None
        self._place, self._mark, self._passing = 0, b"", False
        return before > 0

    def _goes_on(self, file: Any) -> bool:
        return _read(file, self._place - len(self._mark), len(self._mark)) == self._mark

    def _lines(self, data: bytes) -> list[bytes]:
        """Take the whole lines of what was read, and move the place behind them; half a line is left for later."""
        end = data.rfind(b"\n") + 1
        if not end and len(data) == BLOCK:  # inside a line that is too long
            end, self._passing = len(data), True
            lines = []
        else:
            lines = data[:end].split(b"\n")[:-1]
            if lines and self._passing:
                lines, self._passing = lines[1:], False
        self._place += end
        self._mark = (self._mark + data[:end])[-MARK:]
        return lines


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """Return inode, size and time of a file, which change when the file does; None where there is none."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _read(file: Any, place: int, count: int) -> bytes:
    """Return up to `count` bytes at a place, none of them read ahead."""
    file.seek(place)
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
