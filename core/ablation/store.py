"""Where the runs of ablations are kept, and an index of them in a database that can be made again from the folders.

STORE/runs/KEY/run/       a run folder
STORE/runs/KEY/           job.json: what was asked for; failed.json: how the last try ended, if badly; worker.txt: what
                          it said; lock: held by whoever trains it; machine.json: where it ran, each time it was started
STORE/ablations/NAME/     members.json (which runs an ablation has), report.html and its pictures
STORE/*/*/lock            of an ablation: held by whoever writes there
STORE/index.sqlite        the index: SQLite with a write-ahead log, or any database that SQLAlchemy knows
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from core.ablation.folders import Stamps, finished, stamps_of
from core.ablation.index import COLUMNS, Index, StoreError, sqlite_address
from core.ablation.locks import alone, make
from core.ablation.plan import Ablation, Job, job_key
from core.ablation.records import SCHEMA, Start, read_failure, read_job, read_members, starts
from core.ablation.stats.results import Outcome, Result, Status, read_result
from core.config import SCHEMA as CONFIG_SCHEMA
from core.config import to_json
from core.files import FileError, append_file, locked, open_file, replace_file
from core.training.run import RunError


class Place(NamedTuple):
    """A job and where it is kept."""

    job: Job
    key: str
    folder: Path
    """The run folder."""

    @property
    def home(self) -> Path:
        """The folder of the run folder and of what belongs to it."""
        return self.folder.parent


class Store:
    """One folder of runs and its index."""

    def __init__(self, path: str | Path, database: str | None = None) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{path}: is a file, expected a folder of ablations; choose another --store")
        self._index = Index(database) if database else None
        self._late: dict[str, Callable[[], None]] = {}
        self._read: dict[Path, tuple[Stamps, Result]] = {}
        """Finished runs that were read, since a long run's metrics take a tenth of a second."""

    @property
    def index(self) -> Index:
        """The database of the index."""
        self._index = self._index or Index(sqlite_address(self.path / "index.sqlite"))
        return self._index

    def place(self, job: Job, code: str, data: dict[str, str]) -> Place:
        """Return where a job is kept."""
        key = job_key(job, code, data)
        return Place(job, key, self.path / "runs" / key / "run")

    def ablation_folder(self, plan: Ablation) -> Path:
        """Return where an ablation's report and list of runs are."""
        return self.path / "ablations" / plan.name

    def prepare(self, place: Place, code: str, data: dict[str, str], command: str) -> None:
        """Write job.json of a run, which is what its worker reads."""
        make(place.home)
        job = place.job
        value = {
            "schema": SCHEMA, "key": place.key, "config": to_json(job.config), "backend": job.backend,
            "dtype": job.dtype, "code": code, "data": data, "command": command,
        }  # fmt: skip
        replace_file(place.home / "job.json", json.dumps(value, indent=1).encode())

    def write_members(self, plan: Ablation, places: list[Place]) -> None:
        """Write which runs an ablation has."""
        folder = self.ablation_folder(plan)
        rows = [[p.job.variant, p.job.seed, p.job.backend, p.key] for p in places]
        value = {"schema": SCHEMA, "ablation": plan.name, "file": os.path.abspath(plan.path), "runs": rows}
        with alone(folder):
            replace_file(folder / "members.json", json.dumps(value, indent=1).encode())

    def check_name(self, plan: Ablation) -> None:
        """Raise StoreError if the store has an ablation of this name that another file describes.

        A file that is gone was moved, or the store was: on a Mac one file also has two names, /tmp and /private/tmp.
        """
        file = self.ablation_folder(plan) / "members.json"
        if file.exists():
            _, before, _ = read_members(file)
            if os.path.exists(before) and not os.path.samefile(before, plan.path):
                raise StoreError(
                    f"{plan.path}: name: {plan.name!r} is that of {before} in {self.path}: give it another name"
                )

    def earlier(self, plan: Ablation) -> int:
        """Return how many runs of an ablation are of an earlier schema, so that they are read but not continued."""
        file, count = self.ablation_folder(plan) / "members.json", 0
        for member in read_members(file)[2] if file.exists() else []:
            with suppress(StoreError, OSError):  # a damaged run is told of where it is used
                count += read_job(self.path / "runs" / member.key).schema != CONFIG_SCHEMA
        return count

    def begin(self, place: Place, start: Start) -> None:
        """Write down where a run is started."""
        self._write_starts(place, [*starts(place.home), start])

    def end(self, place: Place, seconds: float, beside: float) -> None:
        """Write down how long the last start took and how many runs ran side by side then, on average, with it."""
        *before, last = starts(place.home) or (Start(),)
        self._write_starts(place, [*before, last._replace(seconds=seconds, beside=beside)])

    def _write_starts(self, place: Place, made: list[Start]) -> None:
        value = {"schema": SCHEMA, "starts": [one._asdict() for one in made]}
        replace_file(place.home / "machine.json", json.dumps(value, indent=1).encode())

    @contextmanager
    def held(self, place: Place) -> Iterator[BinaryIO | None]:
        """Hold a run against every other process; None where another one holds it. It is inherited by a worker."""
        make(place.home)
        with append_file(place.home / "lock") as file:
            yield file if locked(file) else None

    def busy(self, place: Place) -> bool:
        """Whether some process trains a run now."""
        try:
            with open_file(place.home / "lock") as file:  # shared: whoever only looks keeps nobody else from looking
                return not locked(file, shared=True)
        except FileNotFoundError:
            return False

    def status(self, place: Place) -> tuple[Status, str | None]:
        """Return where a run stands, and what it said last if it failed."""
        if finished(place.folder):
            return "done", None
        if self.busy(place):
            return "running", None
        if (place.home / "failed.json").exists():
            return "failed", read_failure(place.home)
        return "waiting", None

    def failed_since(self, place: Place, when: float) -> bool:
        """Whether a run has failed since a time (of time.time)."""
        failed = place.home / "failed.json"
        return failed.exists() and failed.stat().st_mtime >= when

    def fail(self, place: Place, message: str) -> None:
        """Write down how a try ended."""
        replace_file(place.home / "failed.json", json.dumps({"schema": SCHEMA, "message": message}).encode())

    def outcome(self, plan: Ablation, places: list[Place]) -> Outcome:
        """Read what all runs of an ablation gave so far; one whose folder is damaged counts as failed."""
        return Outcome(plan, tuple(map(self._result, places)))

    def _result(self, place: Place) -> Result:
        job = place.job
        state, message = self.status(place)
        stamps = stamps_of(place.folder)
        seen, result = self._read.get(place.folder, (None, None))
        if state == "done" and result is not None and seen == stamps:  # another variant's name may ask for it now
            return result._replace(variant=job.variant, seed=job.seed, backend=job.backend)
        try:
            result = read_result(job, place.folder, state, message)
        except (RunError, FileError, OSError) as error:
            if state == "running":  # its process will say so itself
                return Result(job.variant, job.seed, job.backend, state, place.folder)
            return Result(job.variant, job.seed, job.backend, "failed", place.folder, message=message or str(error))
        if state == "done":
            self._read[place.folder] = stamps, result
        return result

    # The index.

    def update(self, place: Place, result: Result) -> None:
        """Enter one run into the index; after a StoreError `settle` tries again."""
        row = _row(place.folder, result)
        self._enter(place.key, lambda: self.index.put(row))

    def enter_members(self, plan: Ablation, places: list[Place]) -> None:
        """Enter an ablation's list of runs into the index, in place of an earlier one; a StoreError as above."""
        rows = [_member(plan.name, p.job.variant, p.job.seed, p.job.backend, p.key) for p in places]
        self._enter("members", lambda: self.index.put_members(plan.name, rows))

    def _enter(self, name: str, act: Callable[[], None]) -> None:
        self._late[name] = act
        act()
        del self._late[name]

    def settle(self) -> None:
        """Enter what could not be entered; StoreError if that fails again."""
        for name, act in list(self._late.items()):
            self._enter(name, act)

    def rebuild(self) -> int:
        """Make the index again from the folders and return how many runs it has; StoreError names a damaged file."""
        found: dict[str, list[dict[str, Any]]] = {}

        def read() -> dict[str, list[dict[str, Any]]]:
            found["runs"] = [self._read_row(folder) for folder in self._folders()]
            files = sorted(self.path.glob("ablations/*/members.json"))
            found["members"] = [row for file in files for row in _member_rows(file)]
            return found

        self.index.rebuild(read)
        return len(found["runs"])

    def _folders(self) -> list[Path]:
        """Return all run folders, with those that a run failed before it made them."""
        found = [file for name in ("run", "failed.json") for file in (self.path / "runs").glob(f"*/{name}")]
        return sorted({file.with_name("run") for file in found})

    def rows(self, table: str = "runs") -> list[dict[str, Any]]:
        """Return a table of the index, `runs` or `members`."""
        return self.index.rows(table)

    def _read_row(self, folder: Path) -> dict[str, Any]:
        home = folder.parent
        made = read_job(home)
        if made.key != home.name:
            raise StoreError(
                f"{home / 'job.json'}: key {made.key!r}, but its folder has another name: a copy; move it away"
            )
        job = Job("", made.config.seed, made.backend, made.config, made.dtype)
        return _row(folder, self._result(Place(job, made.key, folder)))


def _row(folder: Path, result: Result) -> dict[str, Any]:
    """Return a run as a row of the index."""
    job = read_job(folder.parent)
    made: dict[str, Any] = {name: getattr(result, name, None) for name in COLUMNS}
    made |= {"key": job.key, "preset": job.config.preset, "seed": job.config.seed, "code": job.code}
    made |= {
        "dtype": result.dtype or job.dtype,
        "data": json.dumps(job.data),
        "config": json.dumps(to_json(job.config)),
    }
    return made | {"folder": f"runs/{job.key}/run"}


def _member(ablation: str, variant: str, seed: int, backend: str, key: str) -> dict[str, Any]:
    return {"ablation": ablation, "variant": variant, "seed": seed, "backend": backend, "key": key}


def _member_rows(file: Path) -> list[dict[str, Any]]:
    name, _, members = read_members(file)
    if name != file.parent.name:
        raise StoreError(f"{file}: of {name!r}, but its folder has another name: a copy; move it away")
    return [_member(name, *member) for member in members]
