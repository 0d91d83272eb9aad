"""Locks on files of a store: they end with the process that holds them, whatever becomes of it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from core.ablation.index import StoreError


def locked(file: IO, how: int) -> bool:
    """Take a lock (of fcntl.flock) that ends with the file; False if another has it, StoreError where none can be."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(f"{file.name}: {error.strerror}: no locks here; choose a --store on another disk") from error
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder, wait until no other process of this store writes into it, and hold it until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as file:
        locked(file, fcntl.LOCK_EX)
        yield
