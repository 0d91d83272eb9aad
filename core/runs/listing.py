"""Which runs and ablations there are under a folder, in the order that somebody asks for."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from core.ablation.records import StoreError, read_member_rows
from core.checks import in_words, require
from core.console import one_line
from core.runs.row import RunRow, RunState, ablation_row, member_row, run_row
from core.training.records import RunError

Order = Literal["age", "score", "bytes", "speed", "name"]
DEEPEST = 3
"""Folders between the one that is looked through and a run; what lies deeper is somebody else's."""


def list_runs(folder: str | os.PathLike[str] = "runs", *, members: bool = False) -> list[RunRow]:
    """Return a row for every run and every ablation under `folder`, the last changed first.

    A damaged one is a row that says so; links are not followed. `members`: a row for every run of an ablation too.
    RunError if there is no such folder, ConfigError for what is no path.
    """
    require(isinstance(folder, str | os.PathLike), f"folder={in_words(folder)}: expected a folder of runs")
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise RunError(f"{path}: {what}, expected a folder of runs; make a run with: skc train tiny")
    return in_order(list(_rows(path, members, DEEPEST)), "age")


def in_order(rows: Sequence[RunRow], order: Order, reverse: bool = False) -> list[RunRow]:
    """Return rows with the best first: lowest score, fewest bytes, fastest, youngest, first by name.

    Rows that lack the figure come last, also in reverse.
    """
    values = {
        "age": lambda row: -row.changed,
        "score": lambda row: row.bpb,
        "bytes": lambda row: row.total,
        "speed": lambda row: row.tokens_per_second and -row.tokens_per_second,
        "name": lambda row: row.path,
    }
    named = sorted(rows, key=lambda row: row.path)
    have = [row for row in named if values[order](row) is not None]
    lack = [row for row in named if values[order](row) is None]
    return sorted(have, key=values[order], reverse=reverse) + lack


def chosen_rows(
    rows: Sequence[RunRow], preset: str | None = None, backend: str | None = None, state: RunState | None = None
) -> list[RunRow]:
    """Return the rows of a preset, a backend and a state; None: of any."""
    wanted = {"preset": preset, "backend": backend, "state": state}
    return [row for row in rows if all(value in (None, getattr(row, name)) for name, value in wanted.items())]


def is_store(folder: Path) -> bool:
    """Return whether a folder is a store of ablations."""
    return (folder / "runs").is_dir() and (folder / "ablations").is_dir()


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name, without links; OSError."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _rows(folder: Path, members: bool, depth: int) -> Iterator[RunRow]:
    if os.path.lexists(folder / "config.json"):
        yield run_row(folder, folder.parent if os.path.lexists(folder.parent / "job.json") else None)
        return
    try:
        if is_store(folder):
            ablations = subfolders(folder / "ablations")
            yield from map(ablation_row, ablations)
            if members:
                names = _variants(ablations)
                yield from (member_row(home, names.get(home.name)) for home in subfolders(folder / "runs"))
        elif depth:
            for inner in subfolders(folder):
                yield from _rows(inner, members, depth - 1)
    except OSError as error:
        yield RunRow(str(folder), "run", "damaged", problem=one_line(f"{folder}: {error.strerror}"))


def _variants(ablations: Sequence[Path]) -> dict[str, str]:
    """Return key -> ablation and variant of the runs of a store; of a run of several, the last of these."""
    names: dict[str, str] = {}
    for folder in ablations:
        with suppress(StoreError):  # its own row says so
            _, members = read_member_rows(folder / "members.json")
            names |= {member.key: f"{folder.name} {member.variant}" for member in members}
    return names
