"""Tells finished runs from others, and remembers the answer, since it is asked for many times."""

from contextlib import suppress
from pathlib import Path

from core.ablation.stats.results import final
from core.files import FileError
from core.training.run import Run, RunError

Stamps = tuple[tuple[int, int, int] | None, ...]
FINAL: dict[Path, tuple[Stamps, tuple[bool, str]]] = {}
"""Run folder -> what `_final` found, and its files then: a long run's metrics are asked for many times."""


def finished(folder: Path) -> bool:
    """Whether a run folder holds a finished run, whole."""
    return _final(folder)[0]


def damage(folder: Path) -> str:
    """Return what is wrong with a run folder; empty if nothing is, or if there is none yet."""
    return _final(folder)[1]


def _final(folder: Path) -> tuple[bool, str]:
    if not (folder / "config.json").exists():
        return False, ""
    stamps = stamps_of(folder)
    if FINAL.get(folder, (None,))[0] == stamps:
        return FINAL[folder][1]
    try:
        answer = final(Run.open(folder).metrics()) is not None, ""
    except (RunError, FileError, OSError) as error:
        answer = False, str(error)
    FINAL[folder] = stamps, answer
    return answer


def stamps_of(folder: Path) -> Stamps:
    """Return inode, size and time of the files that a result is read from: they change when a file does."""
    stamps: list[tuple[int, int, int] | None] = []
    for file in (*(folder / name for name in ("config.json", "metrics.jsonl", "env.json")), folder / "../machine.json"):
        stamps.append(None)
        with suppress(OSError):
            status = file.stat()
            stamps[-1] = status.st_ino, status.st_size, status.st_mtime_ns
    return tuple(stamps)
