"""Removes run folders and stores, and nothing else: no other folder, no run under way, nothing behind a link."""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from core.ablation.records import StoreError, read_members
from core.runs.listing import is_store, subfolders
from core.training.records import RunError
from core.training.run import NAMES, Run
from core.training.writer import is_held, sole_writer

RUN_NAMES = {name.partition("/")[0] for name in NAMES}
STORE_NAMES = {"runs", "ablations"}


class Removal(NamedTuple):
    """A folder that may be removed, and what that would take away."""

    path: Path
    what: str
    files: int
    bytes: int
    others: tuple[str, ...] = ()
    """Names in it that training did not write: an audit, a twin, a note."""


def check_removals(paths: Sequence[str]) -> list[Removal]:
    """Return what removing `paths` takes away; RunError names the first that is no run and no store, or is in use."""
    removals = [_removal(Path(path)) for path in paths]
    real = [Path(os.path.realpath(removal.path)) for removal in removals]
    for i, path in enumerate(real):
        for other in real[:i]:
            if path == other or path in other.parents or other in path.parents:
                raise RunError(f"{paths[i]}: is named twice, or lies in another one; name each once")
    return removals


def remove(removal: Removal) -> None:
    """Remove a folder, each run of it under its lock; RunError if a process has taken one meanwhile, OSError."""
    if removal.what == "store":
        for home in [*subfolders(removal.path / "runs"), *subfolders(removal.path / "ablations")]:
            _remove(home, [home])
        shutil.rmtree(removal.path)
    else:
        _remove(removal.path, _locks(removal.path))


def _remove(folder: Path, locks: Sequence[Path]) -> None:
    with ExitStack() as stack:
        for place in locks:
            stack.enter_context(sole_writer(place))
        shutil.rmtree(folder)  # which takes links away and never follows one


def _removal(path: Path) -> Removal:
    if path.is_symlink():
        raise RunError(f"{path}: is a link; name the folder that it leads to")
    if not path.is_dir():
        raise RunError(
            f"{path}: {'is a file' if path.exists() else 'does not exist'}, expected a run folder or a store"
        )
    here, real = Path(os.path.realpath(".")), Path(os.path.realpath(path))
    if real in (here, *here.parents):
        raise RunError(f"{path}: is the folder that this command runs in, or holds it; go to another one first")
    store = not os.path.lexists(path / "config.json") and is_store(path)
    if store:
        _check_store(path)
    else:
        _check_run(path)
    inner = [*subfolders(path / "runs"), *subfolders(path / "ablations")] if store else _inner(path)
    places = [path, *inner] if store else [*_locks(path), *inner]
    for place in places:
        if is_held(place) or is_held(place / "run"):
            raise RunError(f"{place}: a process works in it: wait until it ends, or stop it")
    files = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
    size = sum(os.lstat(file).st_size for file in files)
    others = () if store else tuple(sorted(set(os.listdir(path)) - RUN_NAMES))
    return Removal(path, "store" if store else "run", len(files), size, others)


def _locks(path: Path) -> list[Path]:
    """Return the folders whose locks stand for a run: its own, and in a store the one around it."""
    return [path, path.parent] if os.path.lexists(path.parent / "job.json") else [path]


def _inner(path: Path) -> list[Path]:
    """Return the folders in a run that have locks of their own (a twin's, an audit's); RunError for another run."""
    folders = [(Path(place), names) for place, _, names in os.walk(path) if place != str(path)]
    for place, names in folders:
        if {"config.json", "metrics.jsonl"} <= {*names}:
            raise RunError(f"{place}: is a run inside {path}; move it away, or remove it first")
    return [place for place, names in folders if "lock" in names]


def _check_run(path: Path) -> None:
    """Raise RunError unless a folder is a run: one that can be read, or that holds nothing but a run's files."""
    if not os.path.lexists(path / "config.json"):
        raise RunError(f"{path}: is not a run (it has no config.json) and no store; remove it by other means")
    try:
        Run.open(path)
    except (ValueError, OSError) as error:
        strangers = sorted(set(os.listdir(path)) - RUN_NAMES)
        if strangers:
            text = f"is no run that can be read, and holds {strangers[0]}, which is no run's"
            raise RunError(f"{path}: {text}; remove it by other means") from error


def _check_store(path: Path) -> None:
    """Raise RunError unless a folder holds a store's folders alone, with at least one ablation that can be read."""
    strangers = sorted(set(os.listdir(path)) - STORE_NAMES)
    if strangers:
        raise RunError(f"{path}: holds {strangers[0]}, which is no store's; remove it by other means")
    problem: Exception | None = None
    for folder in subfolders(path / "ablations"):
        try:
            read_members(folder / "members.json")
            return
        except StoreError as error:
            problem = error
    raise RunError(
        f"{path}: has no ablation that can be read, so that it may be no store: remove it by other means"
    ) from (problem)
