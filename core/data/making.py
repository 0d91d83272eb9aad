"""How a data folder comes to be: in a part of the folder that was named, held by one process, manifest last.

Nothing beside the folder is written and the folder itself is never replaced, so mounts, links and `.` work, and what a
killed process left behind lies where the next one finds it.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.data.column import DataError
from core.data.dataset import open_dataset
from core.data.manifest import MANIFEST, read_manifest
from core.files import append_file, locked, own_folder, place_file, replace_file, sweep, sync_folder

PART = ".part"
"""Folder in the named one where files are made."""
LOCK = "lock"
OWN = re.compile(r"(train|val)_(\d{6}\.bin|document_bytes\.npy)|tokenizer\.model")
"""Names of what is made here."""


def find_manifest(out: str) -> dict[str, Any] | None:
    """Return the manifest of a folder of ours; None if `out` is empty, not there yet, or begun and never finished.

    DataError if it is something else.
    """
    if not os.path.lexists(out):
        return None
    if not os.path.isdir(out):
        what = "is a link to nothing" if os.path.islink(out) and not os.path.exists(out) else "is no folder"
        raise DataError(f"{out}: {what}; choose another --out")
    there = set(os.listdir(out))
    if not there - {PART} or (PART in there and MANIFEST not in there):
        return None
    try:
        return read_manifest(out)
    except DataError as error:
        raise DataError(f"{out}: exists and holds no prepared data; choose another folder ({error})") from error


def check_writable(out: str) -> None:
    """Raise DataError, before any work, if a folder could not be made or filled."""
    place = os.path.abspath(out)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise DataError(f"{out}: {place} is no folder; choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DataError(f"{out}: {place} cannot be written to; choose another --out")


def find_damage(out: str) -> str | None:
    """Return what is wrong with a folder of ours, whose files are held to sizes and checksums; None: nothing."""
    try:
        dataset = open_dataset(out)
        for split in (dataset.train, dataset.val):
            split.verify()
            _ = split.document_bytes
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def making(out: str, waiting: Callable[[], None], keep: str = "") -> Iterator[Path]:
    """Hold the folder `out`, made if it is not there, and yield an empty one in it, which is gone in the end.

    Where another process holds it, `waiting` is called and the block begins when that one is done. What has the name
    `keep` in the yielded folder stays where a block failed, and lies there when the next one begins.
    """
    fresh = not os.path.lexists(out)
    os.makedirs(out, exist_ok=True)
    part = Path(out, PART)
    lock = _hold(part, waiting)
    try:
        _clear(part, keep)  # of what a process left that was killed
        yield part
    finally:
        _clear(part, keep)
        if not (part / keep).exists() or not keep:
            shutil.rmtree(part, ignore_errors=True)
        if fresh and not os.listdir(out):
            os.rmdir(out)
        lock.close()


def _hold(part: Path, waiting: Callable[[], None]) -> Any:
    """Lock the part for this process: whoever held it before has removed the file that was waited for."""
    while True:
        own_folder(part)
        lock = append_file(part / LOCK)
        try:
            if not locked(lock):
                waiting()
                locked(lock, wait=True)
            if os.path.samestat(os.stat(part / LOCK), os.fstat(lock.fileno())):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            lock.close()
            raise
        lock.close()


def _clear(part: Path, keep: str) -> None:
    for name in set(os.listdir(part)) - {LOCK, keep}:
        if (part / name).is_dir() and not (part / name).is_symlink():
            shutil.rmtree(part / name)
        else:
            (part / name).unlink(missing_ok=True)


def install(part: Path, out: str, manifest: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Put what lies in the part in place of a folder's data, whose manifest was `before`; the new one comes last.

    A kill on the way leaves no manifest, and the next `prepare` makes the data again.
    """
    old = {name for name in os.listdir(out) if OWN.fullmatch(name)} if before is None else _files(before)
    Path(out, MANIFEST).unlink(missing_ok=True)
    sweep(out)
    names = set(os.listdir(part)) - {LOCK}
    for name in old - names:
        Path(out, name).unlink(missing_ok=True)
    for name in names:
        place_file(part / name, Path(out, name))
    sync_folder(out)
    write_manifest(out, manifest)


def write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder."""
    replace_file(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=1).encode())


def _files(manifest: dict[str, Any]) -> set[str]:
    splits = manifest["splits"].values()
    names = {record["file"] for split in splits for record in split["files"]}
    names |= {record["file"] for split in splits for record in split.get("token_bytes") or ()}
    names |= {split["document_bytes"] for split in splits if split.get("document_bytes")}
    return names | {manifest["tokenizer"]["file"]}
