"""A submission folder as it lies on a disk, ours or anyone's: what is in it, read with bounds and without links."""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.console import printable
from core.files import FileError, bound_values, check_name, decode_text, read_file
from core.submission.log_values import Log
from core.submission.public_logs import read_log

TRACKS = ("10min_16mb", "non_record_16mb")
SEVERAL = ("track_10min_16mb", "track_non_record_16mb")
MAX_ENTRIES = 1000
MAX_DEPTH = 4
MAX_FILE = 10_000_000
"""Bytes of the largest file that a folder may hold."""
MAX_JSON = 4 << 20
MAX_TEXT = 2_000_000
"""Bytes of the longest README and program that are looked into; the published ones have at most 0.2 MB."""
MAX_TEXTS = 32 << 20
"""Bytes of all files that are searched for what must not be sent."""
DATED = re.compile(r"\d{4}-\d{2}-\d{2}_[^/]{1,200}")
LOG_NAME = re.compile(r"train_seed(\d{1,10})\.log")
NO_LOGS = ("requirements", "license", "notes", "readme")


class SubmissionError(ValueError):
    """A folder or a run cannot be used for a submission: the message says why and what to do."""


@dataclass(frozen=True)
class FolderEntry:
    """A name in the folder."""

    name: str
    """Relative to the folder, with slashes."""
    kind: str
    """file, folder, link or other."""
    size: int


@dataclass(frozen=True)
class SubmissionFolder:
    """What a folder holds; None: it does not, or it cannot be read, and then `problems` says so."""

    path: Path
    entries: tuple[FolderEntry, ...]
    submission: dict[str, Any] | None
    submission_name: str
    doubled: tuple[str, ...]
    """Keys that submission.json has twice."""
    logs: tuple[Log, ...]
    """One of each seed."""
    spare: tuple[Log, ...]
    """Further logs of a seed that has one."""
    readme: str | None
    program: bytes | None
    program_name: str
    audit: dict[str, Any] | None
    problems: tuple[str, ...]
    """Files that cannot be read as what they are named."""

    @property
    def ours(self) -> bool:
        """Whether every log is in our format."""
        return bool(self.logs) and all(log.skc_log is not None for log in self.logs)

    @property
    def track(self) -> str:
        """Return the track that submission.json names, in our spelling, or else that of the folder's place."""
        named = str((self.submission or {}).get("track") or self.path.resolve().parent.name)
        return TRACKS[0] if "10min" in named else TRACKS[1]

    @property
    def claimed(self) -> dict[int, dict[str, Any]]:
        """Return what submission.json says of each seed, in whichever of the public habits."""
        values = self.submission or {}
        results = values.get("seed_results")
        results = results if isinstance(results, dict) else values.get("seeds")
        pairs = results.items() if isinstance(results, dict) else ()
        return {
            int(seed): value for seed, value in pairs if seed.isdecimal() and len(seed) < 11 and type(value) is dict
        }

    def texts(self) -> list[tuple[str, str]]:
        """Return (name, content) of the files, MAX_TEXTS bytes of them at most.

        Of a file that is no text what can be read in it, UTF-16 too.
        """
        contents, left = [], MAX_TEXTS
        for entry in self.entries:
            if entry.kind != "file" or entry.size > min(left, MAX_FILE):
                continue
            left -= entry.size
            try:
                data = read_file(self.path / entry.name, MAX_FILE, follow=False)
            except (FileError, OSError):  # check 1 names it
                continue
            contents.append((entry.name, data.replace(b"\0", b"").decode("utf-8", "replace")))
        return contents


def find_folder(path: Path) -> Path:
    """Return the submission folder that is meant: `path`, or the only one in the places of the tracks below it."""
    check_name(path)
    if not path.is_dir():
        raise SubmissionError(
            f"{path}: no such folder; give a submission folder, or make one: skc submit RUN ... --out"
        )
    below = [place for track in SEVERAL for place in sorted((path / "records" / track).glob("*"))[:3] if place.is_dir()]
    if len(below) > 1:
        raise SubmissionError(f"{path}: holds several submissions; name one of them, as {below[0]}")
    return below[0] if below else path


def read_folder(path: Path) -> SubmissionFolder:
    """Return what a folder holds; whatever is odd in it is noted, not raised; OSError for the folder itself."""
    entries, problems = _entries(path)
    files = {entry.name: entry for entry in entries if entry.kind == "file"}

    def content(name: str, limit: int) -> bytes | None:
        try:
            return read_file(path / name, limit, follow=False)
        except (FileError, OSError) as error:
            problems.append(_of(path, error))
            return None

    def text(name: str, limit: int = MAX_FILE) -> str | None:
        data = content(name, limit)
        try:
            return None if data is None else decode_text(name, data)
        except FileError as error:
            problems.append(str(error))
            return None

    def value(name: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        written = text(name, MAX_JSON)
        try:
            return (None, ()) if written is None else parse_object(name, written)
        except FileError as error:
            problems.append(str(error))
            return None, ()

    named = [name for name in sorted(files) if re.fullmatch(r"submission(_\w{1,60})?\.json", name)]
    name = "submission.json" if "submission.json" in named else named[0] if named else ""
    submission, doubled = value(name) if name else (None, ())
    programs = [n for n in sorted(files) if n.endswith(".py") and n.startswith("train")]
    program = "train_gpt.py" if "train_gpt.py" in files else programs[0] if programs else ""
    logs, spare = _logs(path, files, problems)
    return SubmissionFolder(
        path=path,
        entries=tuple(entries),
        submission=submission,
        submission_name=name,
        doubled=doubled,
        logs=logs,
        spare=spare,
        readme=text("README.md", MAX_TEXT) if "README.md" in files else None,
        program=content(program, MAX_TEXT) if program else None,
        program_name=program,
        audit=value("audit.json")[0] if "audit.json" in files else None,
        problems=tuple(problems),
    )


def parse_object(where: str, text: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a JSON object and the keys that some object in it has twice; FileError names `where`."""
    doubled: dict[str, None] = {}

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        times = Counter(key for key, _ in pairs)
        doubled.update(dict.fromkeys(key for key, count in times.items() if count > 1))
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    bound_values(where, text)
    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FileError(f"{where}: expected a JSON object")
    return value, tuple(doubled)


def _entries(path: Path) -> tuple[list[FolderEntry], list[str]]:
    """Return every name below a folder, and what is too much of them; links are not followed."""
    entries: list[FolderEntry] = []
    problems: list[str] = []
    waiting = [(path, "", 0)]
    while waiting:
        place, prefix, depth = waiting.pop()
        with os.scandir(place) as listing:
            items = list(itertools.islice(listing, MAX_ENTRIES + 1))
        for item in items:
            if len(entries) >= MAX_ENTRIES:
                return entries, [f"over {MAX_ENTRIES:,} names: this is no submission folder"]
            kind = "link" if item.is_symlink() else "folder" if item.is_dir() else "file" if item.is_file() else "other"
            name = f"{prefix}{item.name}"
            entries.append(FolderEntry(name, kind, item.stat(follow_symlinks=False).st_size if kind == "file" else 0))
            if kind == "folder" and depth < MAX_DEPTH and item.name != ".git":
                waiting.append((Path(item.path), f"{name}/", depth + 1))
            elif kind == "folder" and item.name != ".git":
                problems.append(f"{name}: lies below {MAX_DEPTH} folders, and what is in it was not looked at")
    return sorted(entries, key=lambda entry: entry.name), problems


def _logs(path: Path, files: dict[str, FolderEntry], problems: list[str]) -> tuple[tuple[Log, ...], tuple[Log, ...]]:
    """Return a log of each seed, that of the proper name first, and further ones."""
    logs: list[Log] = []
    for name in files:
        suffix, stem = os.path.splitext(name)[1], os.path.basename(name).lower()
        if suffix not in (".log", ".txt") or stem.startswith(NO_LOGS):
            continue
        try:
            log = read_log(path / name)
        except (FileError, OSError) as error:
            problems.append(_of(path, error))
            continue
        if suffix == ".log" or log.val_bpb is not None or log.losses:
            logs.append(log)
    logs.sort(key=lambda log: (LOG_NAME.fullmatch(log.name) is None, log.val_bpb is None, log.name))
    first: dict[int, Log] = {}
    for log in logs:
        if log.seed is not None:
            first.setdefault(log.seed, log)
    chosen = tuple(first.values())
    return chosen, tuple(log for log in logs if all(log is not other for other in chosen))


def _of(path: Path, error: Exception) -> str:
    """Return what is wrong with a file, without the place of the folder."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return printable(text.replace(f"{path}{os.sep}", ""))
