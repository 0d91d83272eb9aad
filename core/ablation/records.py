"""The small files of a store, each with one typed reader: what another program, version or hand wrote is refused here.

StoreError names the file and the field. What only says how fair a comparison is counts as not known instead.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.checks import in_words
from core.config import SCHEMA as CONFIG_SCHEMA
from core.config import ConfigError, RunConfig, from_json
from core.engine.loading import BACKENDS
from core.files import FileError, read_json

STORE_SCHEMA = 1
MOST_BYTES = 16 << 20
"""Of one of these files."""
MOST_LETTERS = 4096
MOST = 1e12
"""Largest number: of seconds, of threads, of runs side by side."""


class StoreError(ValueError):
    """A file of the store cannot be used: the message names it and says what is wrong."""


class JobFile(NamedTuple):
    """What job.json says: what was asked for of a run."""

    config: RunConfig
    backend: Literal["mlx", "cuda"]
    dtype: str | None
    code: str
    command: str


class Start(NamedTuple):
    """One start of a run's process, as machine.json has it."""

    host: str | None = None
    device: str | None = None
    """CUDA_VISIBLE_DEVICES, where it was set for this run."""
    threads: int | None = None
    parallel: int | None = None
    """Runs that might run side by side."""
    seconds: float | None = None
    """From its start to its end; None if whoever started it was killed."""
    beside: float | None = None
    """Runs that did run side by side, on average; None as above."""


def read_job(home: Path) -> JobFile:
    """Return job.json of a run."""
    file = home / "job.json"
    value = read(file)
    try:
        config = from_json(RunConfig, value.get("config"), "config")
    except ConfigError as error:
        raise StoreError(f"{home / 'run'}: is not a run of this version ({error}); move it away") from error
    dtype = value.get("dtype")
    return JobFile(
        config=config,
        backend=_field(value, "backend", file, lambda v: v in tuple(BACKENDS), " or ".join(BACKENDS)),
        dtype=None if dtype is None else _word(value, "dtype", file),
        code=_word(value, "code", file),
        command=_field(value, "command", file, lambda v: isinstance(v, str), "text"),
    )


def read_members(file: Path) -> tuple[str, list[str]]:
    """Return which file describes an ablation, and the keys of its runs, by its members.json."""
    value = read(file)
    rows = _field(value, "runs", file, lambda v: isinstance(v, list) and all(map(_is_member, v)), "a list of runs")
    return _field(value, "file", file, _short, "a path"), [row[3] for row in rows]


def is_earlier(home: Path) -> bool:
    """Return whether a run was asked for by a version whose settings had an earlier schema."""
    try:
        return read_json(home / "job.json", MOST_BYTES)["config"]["schema"] < CONFIG_SCHEMA
    except (OSError, FileError, KeyError, TypeError):
        return False


def read_failure(home: Path) -> str:
    """Return what failed.json says of a run; if it cannot be read, why."""
    try:
        return str(read(home / "failed.json").get("message"))[:MOST_LETTERS]
    except StoreError as error:
        return str(error)


def starts(home: Path) -> tuple[Start, ...]:
    """Return every start of a run; empty if machine.json cannot be read, since no score depends on it."""
    try:
        value = read_json(home / "machine.json", MOST_BYTES)
        history = tuple(Start(**row) for row in value["starts"])
    except (OSError, FileError, KeyError, TypeError):
        return ()
    return history if all(_is_start(start) for start in history) else ()


def read_shown(file: Path) -> set[str]:
    """Return the keys of the runs that looked.json says were shown; none where it cannot be read."""
    try:
        shown = read_json(file, MOST_BYTES)["shown"]
    except (OSError, FileError, KeyError, TypeError):
        return set()
    return {key for key in shown if _short(key)} if isinstance(shown, list) else set()


def read(file: Path) -> dict[str, Any]:
    """Return the object that one of these files holds."""
    try:
        value = read_json(file, MOST_BYTES)
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}; move its folder away") from error
    except FileError as error:
        raise StoreError(f"{error}; move its folder away") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if type(schema) is not int or schema != STORE_SCHEMA:
        version = in_words(schema if isinstance(value, dict) else value)
        raise StoreError(
            f"{file}: schema {version}, expected {STORE_SCHEMA}: written by another version; move its folder away"
        )
    return value


def _field(value: dict[str, Any], name: str, file: Path, good: Callable[[Any], bool], expected: str) -> Any:
    if not good(value.get(name)):
        raise StoreError(f"{file}: {name}: {in_words(value.get(name))}, expected {expected}; move its folder away")
    return value[name]


def _word(value: dict[str, Any], name: str, file: Path) -> str:
    return _field(value, name, file, lambda v: _short(v) and v != "", "a name")


def _short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_LETTERS


def _is_member(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 4 and _short(row[3]) and row[3].isalnum()


def _is_start(start: Start) -> bool:
    words = all(word is None or _short(word) for word in start[:2])
    numbers = [number for number in start[2:] if number is not None]
    good = all(type(number) in (int, float) and 0 <= number <= MOST for number in numbers)
    return words and good and 0 not in (start.threads, start.parallel, start.beside)
