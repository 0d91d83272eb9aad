"""The small files of a store, each with one typed reader: what another program, version or hand wrote is refused here.

StoreError names the file and the field. What only says how fair a comparison is counts as not known instead.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.checks import in_words
from core.config import SCHEMA as CONFIG_SCHEMA
from core.config import ConfigError, RunConfig, from_json
from core.engine.loading import BACKENDS
from core.files import FileError, read_json
from core.formats.kinds import ANYTHING, Kind, Leaf, among, check_value, number, text

STORE_SCHEMA = 1
MOST_BYTES = 16 << 20
"""Of one of these files."""
CURE = "move its folder away"
MOST_LETTERS = 4096
TEXT = text(MOST_LETTERS)
WORD = Leaf("a name", lambda value: TEXT.fits(value) and value != "")
AMOUNT = number("a number above 0", 1e-9, 1e12)
VERSION = Leaf(
    f"{STORE_SCHEMA}: written by another version", lambda value: type(value) is int and value == STORE_SCHEMA
)
JOB = {"backend": among(*BACKENDS), "dtype??": WORD, "code": WORD, "command": text(MOST_BYTES), "*": ANYTHING}
MEMBER = Leaf("a run", lambda row: isinstance(row, list) and len(row) == 4 and TEXT.fits(row[3]) and row[3].isalnum())
MEMBERS = {"file": TEXT, "runs": [MEMBER], "*": ANYTHING}
START = {
    "host??": TEXT, "device??": TEXT, "threads??": AMOUNT, "parallel??": AMOUNT,
    "seconds??": number("seconds", 0, 1e12), "beside??": AMOUNT,
}  # fmt: skip
MACHINE = {"starts": [START], "*": ANYTHING}


class StoreError(ValueError):
    """A file of the store cannot be used: the message names it and says what is wrong."""


class Member(NamedTuple):
    """A run in the list of an ablation's runs."""

    variant: str
    seed: int
    backend: Literal["mlx", "cuda"]
    key: str


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
    value = read(home / "job.json")
    try:
        config = from_json(RunConfig, value.get("config"), "config")
    except ConfigError as error:
        raise StoreError(f"{home / 'run'}: is not a run of this version ({error}); move it away") from error
    _check(value, JOB, home / "job.json")
    return JobFile(config, value["backend"], value.get("dtype"), value["code"], value["command"])


def read_members(file: Path) -> tuple[str, list[str]]:
    """Return which file describes an ablation, and the keys of its runs, by its members.json."""
    value = read(file)
    _check(value, MEMBERS, file)
    return value["file"], [row[3] for row in value["runs"]]


def read_member_rows(file: Path) -> tuple[str, list[Member]]:
    """Return which file describes an ablation, and its runs with their variants and seeds, by its members.json."""
    where, _ = read_members(file)
    rows = read(file)["runs"]
    for variant, seed, backend, _ in rows:
        if not (WORD.fits(variant) and type(seed) is int and isinstance(backend, str) and backend in BACKENDS):
            given = in_words([variant, seed, backend])
            raise StoreError(f"{file}: runs: {given}, expected variant, seed, backend, key; {CURE}")
    return where, [Member(*row) for row in rows]


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
        check_value(value, MACHINE, "machine.json")
    except (OSError, FileError):
        return ()
    return tuple(Start(**row) for row in value["starts"])


def read_shown(file: Path) -> set[str]:
    """Return the keys of the runs that looked.json says were shown; none where it cannot be read."""
    try:
        value = read_json(file, MOST_BYTES)
        check_value(value, {"shown": [TEXT], "*": ANYTHING}, "looked.json")
    except (OSError, FileError):
        return set()
    return set(value["shown"])


def read(file: Path) -> dict[str, Any]:
    """Return the object that one of these files holds."""
    try:
        value = read_json(file, MOST_BYTES)
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}; {CURE}") from error
    except FileError as error:
        raise StoreError(f"{error}; {CURE}") from error
    _check(value, {"schema": VERSION, "*": ANYTHING}, file)
    return value


def _check(value: Any, kind: Kind, file: Path) -> None:
    try:
        check_value(value, kind, str(file), CURE)
    except FileError as error:
        raise StoreError(str(error)) from error
