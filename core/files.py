"""The doors: the one way in which a file is opened to be read, and the one in which a file is written.

Whatever lies under a name (a FIFO, a device, a link, a folder, a file that is too large, cut or of another type), a
reader gets the bytes of a regular file or one typed error at once, and a writer never writes through a link.
"""

import errno
import fcntl
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

OPENED: list[str] = []
"""Real paths that this process opened through `open_input`, each once: what an audited evaluation declares."""
TELL: BinaryIO | None = None
"""Where each of these is written too, at once and ended by a zero byte: a process may die before it can list them."""
MAX_TEXT = 64 << 20
"""Bytes of the largest text file (JSON, JSON lines, TOML, notes) that is read whole."""
KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link",
}  # fmt: skip
KERNELS = ("/proc", "/sys")
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MOST_VALUES = 1 << 20
"""Values of one JSON text: an empty list is three bytes in the file, and sixty in memory."""
_TEXTS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp$")


class FileError(ValueError):
    """A file cannot be what was expected: the message names the file, what it is and what to do."""


def open_file(path: str | Path, limit: int | None = None, follow: bool = True) -> io.BufferedReader:
    """Open a regular file of at most `limit` bytes for reading; FileError for any other kind, OSError.

    A link to a regular file is one if links are to be followed. Nothing waits, whatever is there, and no device is
    opened.
    """
    check_name(path)
    try:
        _refuse_kind(path, os.stat(path, follow_symlinks=follow))
        links = 0 if follow else os.O_NOFOLLOW
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | links)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise FileError(f"{path}: {error.strerror}, expected a regular file") from error
    try:
        status = os.fstat(handle)
        _refuse_kind(path, status)  # once more: the name may have changed hands since
        if limit is not None and status.st_size > limit:
            raise FileError(
                f"{path}: {status.st_size:,} bytes, expected at most {limit:,}: this is not the file it is named as"
            )
        return open(path, "rb", opener=lambda name, flags: handle)  # noqa: SIM115 - with os.fdopen it had no name
    except BaseException:
        os.close(handle)
        raise


def open_input(path: str | Path, limit: int | None = None) -> io.BufferedReader:
    """Open a file that an evaluation reads (artifact, tokenizer, shards, manifest) and note it in OPENED."""
    file = open_file(path, limit)
    note_input(path)
    return file


def note_input(path: str | Path) -> None:
    """Declare that the evaluation in this process reads `path`."""
    real = os.path.realpath(path)
    if real not in OPENED:
        OPENED.append(real)
        if TELL is not None:
            TELL.write(os.fsencode(real) + b"\0")


def read_file(path: str | Path, limit: int, follow: bool = True) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; FileError, OSError."""
    with open_file(path, limit, follow) as file:
        return read_bounded(path, file, limit)


def read_bounded(path: str | Path, file: BinaryIO, limit: int) -> bytes:
    """Return the rest of an open file of at most `limit` bytes; FileError if it grew beyond that since."""
    data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError(f"{path}: over {limit:,} bytes: this is not the file it is named as")
    return data


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """Return the text of a UTF-8 file, less a byte order mark; FileError, OSError."""
    return decode_text(path, read_file(path, limit))


def decode_text(where: object, data: bytes) -> str:
    """Return UTF-8 `data` as text, less a byte order mark; FileError names `where` and the encoding that was met."""
    for mark, name in MARKS.items():
        if data.startswith(mark):
            raise FileError(f"{where}: is {name}, expected UTF-8: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{where}: not UTF-8: {error.reason} at byte {error.start}: save it as UTF-8") from error


def read_json(path: str | Path, limit: int = MAX_TEXT) -> Any:
    """Return the value of a JSON file; FileError, OSError."""
    return parse_json(path, read_text(path, limit))


def parse_json(where: object, text: str, most: int = MOST_VALUES) -> Any:
    """Return the value of a JSON text: at most `most` values, no NaN, no infinity; FileError names `where`."""
    bound_values(where, text, most)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not JSON ({error}); the file is damaged") from error


def bound_values(where: object, text: str, most: int = MOST_VALUES) -> None:
    """Raise FileError for a JSON text of so many values that they would fill the memory."""
    if sum(map(text.count, ",[{")) > most and sum(map(_TEXTS.sub("", text).count, ",[{")) > most:
        raise FileError(f"{where}: over {most:,} values: this is not the file it is named as")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def check_name(path: str | Path) -> None:
    """Raise FileError for a name that no file can have: with NUL, or with half of a surrogate pair."""
    name = os.fspath(path)
    try:
        good = "\0" not in name and os.fsencode(name)
    except UnicodeEncodeError:
        good = False
    if not good:
        raise FileError(f"{name[:200]!r}: is no name of a file")


def _refuse_kind(path: str | Path, status: os.stat_result) -> None:
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        raise FileError(f"{path}: is {KINDS.get(stat.S_IFMT(mode), 'no file')}, expected a regular file")
    for place in KERNELS:  # what lies there looks regular, and may wait, or fail, or never end when it is read
        if os.path.isdir(place) and os.stat(place).st_dev == status.st_dev != os.stat("/").st_dev:
            raise FileError(f"{path}: is a file of the kernel's, expected a regular file on a disk")


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let every OSError of the block name `path`: those of writes and fsyncs (a full disk) name no file at all."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


class _Named(io.FileIO):
    """A file whose failed writes say which file it is."""

    def __init__(self, handle: int, mode: str, path: str | Path) -> None:
        super().__init__(handle, mode)
        self.name = str(path)

    def write(self, data: Any, /) -> int:
        """Write as every file does."""
        with naming(self.name):
            return super().write(data)


@contextmanager
def new_file(path: str | Path, synced: bool = True) -> Iterator[BinaryIO]:
    """Yield a fresh file that takes the place of `path` when the block ends: fsynced (if `synced`), renamed.

    A kill or an error leaves what was there. The fresh name did not exist and is no link; where `path` is a link, the
    link is replaced, not what it points to.
    """
    check_name(path)
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o666), "w+b") as file:
            yield file
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, temporary):  # the block may read other files too
            error.filename, error.filename2 = str(path), None
        raise


def replace_file(path: str | Path, *parts: Any) -> None:
    """Write byte `parts` in place of `path`: a kill leaves the old file or the new one."""
    with new_file(path) as file:
        for part in parts:
            file.write(part)


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` in place of `path`, in UTF-8; lone surrogates become question marks."""
    replace_file(path, text.encode("utf-8", "replace"))


def place_file(source: str | Path, target: str | Path) -> None:
    """Put a finished file, or a folder, under its name: at once, in place of a file that is there; OSError."""
    os.replace(source, target)


def append_file(path: str | Path) -> BinaryIO:
    """Open a file of our own for more bytes at its end, and make it if there is none; FileError for a link, OSError."""
    return io.BufferedWriter(_open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, "ab"))


def edit_file(path: str | Path) -> BinaryIO:
    """Open a file of our own, which must be there, to read it and to write into it; FileError for a link, OSError."""
    return io.BufferedRandom(_open_own(path, os.O_RDWR, "r+b"))


def own_folder(path: str | Path) -> None:
    """Make a folder of our own, or take the one that is there; FileError for a link or anything else, OSError."""
    try:
        os.mkdir(path)
    except FileExistsError:
        mode = os.lstat(path).st_mode
        if not stat.S_ISDIR(mode):
            what = KINDS.get(stat.S_IFMT(mode), "a file")
            raise FileError(f"{path}: is {what}, expected a folder: remove it") from None


def _open_own(path: str | Path, flags: int, mode: str) -> _Named:
    check_name(path)
    try:
        _refuse_kind(path, os.lstat(path))
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    try:
        _refuse_kind(path, os.fstat(handle))
        return _Named(handle, mode, path)
    except BaseException:
        os.close(handle)
        raise


def sweep(folder: str | Path, of: str = "") -> None:
    """Remove what killed writers of `folder`, or of its file `of`, left behind: only whoever holds it may do that."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if TEMPORARY.search(name) and name.startswith(of) and stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)


def sync_file(path: str | Path) -> None:
    """Fsync a file that other handles have written to."""
    with open_file(path) as file, naming(path):
        os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Fsync a folder, so that the names in it outlive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def locked(file: BinaryIO, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends; False if another process holds it; FileError.

    `shared` locks keep out exclusive ones only. Without `wait` the answer comes at once.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise FileError(f"{file.name}: {error.strerror}: no locks here; choose a folder on another disk") from error
    return True
