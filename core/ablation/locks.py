"""The lock of a folder of a store: it ends with the process that holds it, whatever becomes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.files import append_file, locked, own_folder


def make(folder: Path) -> None:
    """Make a folder of a store; FileError where a link is in its place: nothing is written elsewhere."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    own_folder(folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder, wait until no other process of this store writes into it, and hold it until the end."""
    make(folder)
    with append_file(folder / "lock") as file:
        locked(file, wait=True)
        yield
