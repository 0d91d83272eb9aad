"""The one writer of a run folder: a lock on its file `lock`, which ends with its process, whatever ends that."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from core.files import TEMPORARY, append_file, locked, open_file, own_folder, sweep
from core.training.records import RunError, of_a_run


@contextmanager
def hold(path: str | Path, record: str = "config.json") -> Iterator[None]:
    """Be the one process that writes into a run folder, which is made if there is none, until the block ends.

    The lock ends with its process, whatever ends that; what killed writers left is swept. RunError, with nothing
    touched, if another process holds it or something else is in the way. `record`: the file that tells such a folder.
    """
    path = Path(path)
    with ExitStack() as stack:
        with of_a_run():
            refuse_strangers(path, record)
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(path))
            if os.path.lexists(path / "state"):
                own_folder(path / "state")
                sweep(path / "state")
        yield


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Be the one process that writes into a folder that is there, as `hold` does; FileError, RunError."""
    with append_file(folder / "lock") as file:
        if not locked(file):
            raise RunError(f"{folder}: another process writes into it: wait until it ends, or stop it")
        sweep(folder)
        yield


def is_held(folder: Path) -> bool:
    """Return whether a process holds a folder now; FileError, OSError."""
    try:
        with open_file(folder / "lock") as file:  # shared: whoever only looks keeps nobody else from looking
            return not locked(file, shared=True)
    except FileNotFoundError:
        return False


def refuse_strangers(path: Path, record: str = "config.json") -> None:
    """Raise RunError for a path where something else is than a run, an empty folder, or nothing."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file, expected a run folder; choose another folder")
    if path.is_dir() and not (path / record).exists():
        ours = ("state", "lock")  # what a kill during `create` leaves
        if any(name not in ours and not TEMPORARY.search(name) for name in os.listdir(path)):
            raise RunError(f"{path}: exists, is not empty and is not a run; choose another --out")
