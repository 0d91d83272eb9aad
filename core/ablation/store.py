"""Where the runs of ablations are kept, and an index of them in a database that can be made again from the folders.

STORE/runs/KEY/run/       a run folder
STORE/runs/KEY/           job.json: what was asked for; failed.json: how the last try ended, if badly; worker.txt: what
                          it said; lock: held by whoever trains it
STORE/ablations/NAME/     members.json (which runs an ablation has), report.html and its pictures
STORE/index.sqlite        the index: SQLite with a write-ahead log, or any database that SQLAlchemy knows
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from core.ablation.plan import Ablation, Job, job_key
from core.ablation.results import Outcome, Result, Status, read_result
from core.config import ConfigError, to_json
from core.files import replace_file
from core.run import Run, RunError

SCHEMA = 1
COLUMNS = {
    "key": str, "preset": str, "seed": int, "backend": str, "dtype": str, "code": str, "data": str, "status": str,
    "bpb": float, "error": float, "label": str, "byte_rule": str, "bytes": int, "parameters": int, "steps": int,
    "seconds": float, "tokens_per_second": float, "message": str, "config": str, "folder": str,
}  # fmt: skip
"""Table `runs`: one row per run folder."""
MEMBERS = {"ablation": str, "variant": str, "seed": int, "backend": str, "key": str}
"""Table `members`: which runs an ablation has."""

TABLES = {"runs": (COLUMNS, ("key",)), "members": (MEMBERS, ("ablation", "variant", "seed", "backend"))}
"""Columns and primary key of each table."""


class StoreError(ValueError):
    """The store cannot be used: the message names the file and what is wrong with it."""


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
        self.database = database or f"sqlite:///{self.path / 'index.sqlite'}"

    def place(self, job: Job, code: str, data: dict[str, str]) -> Place:
        """Return where a job is kept."""
        key = job_key(job, code, data)
        return Place(job, key, self.path / "runs" / key / "run")

    def ablation_folder(self, plan: Ablation) -> Path:
        """Return where an ablation's report and list of runs are."""
        return self.path / "ablations" / plan.name

    def prepare(self, place: Place, code: str, data: dict[str, str], command: str) -> None:
        """Write job.json of a run, which is what its worker reads."""
        place.home.mkdir(parents=True, exist_ok=True)
        job = place.job
        value = {
            "schema": SCHEMA, "key": place.key, "config": to_json(job.config), "backend": job.backend,
            "dtype": job.dtype, "code": code, "data": data, "command": command,
        }  # fmt: skip
        replace_file(place.home / "job.json", json.dumps(value, indent=1).encode())

    def write_members(self, plan: Ablation, places: list[Place]) -> None:
        """Write which runs an ablation has."""
        folder = self.ablation_folder(plan)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [[p.job.variant, p.job.seed, p.job.backend, p.key] for p in places]
        value = {"schema": SCHEMA, "ablation": plan.name, "file": os.path.abspath(plan.path), "runs": rows}
        replace_file(folder / "members.json", json.dumps(value, indent=1).encode())

    def check_name(self, plan: Ablation) -> None:
        """Raise StoreError if the store has an ablation of this name that another file describes."""
        file = self.ablation_folder(plan) / "members.json"
        if file.exists():
            before = _read(file).get("file")
            if before != os.path.abspath(plan.path):
                raise StoreError(
                    f"{plan.path}: name: {plan.name!r} is that of {before} in {self.path}: give it another name"
                )

    @contextmanager
    def held(self, place: Place) -> Iterator[IO | None]:
        """Hold a run against every other process; None where another one holds it. It is inherited by a worker."""
        place.home.mkdir(parents=True, exist_ok=True)
        with open(place.home / "lock", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield file

    def busy(self, place: Place) -> bool:
        """Whether some process trains a run now."""
        if not (place.home / "lock").exists():
            return False
        with self.held(place) as held:
            return held is None

    def status(self, place: Place) -> tuple[Status, str | None]:
        """Return where a run stands, and what it said last if it failed."""
        failed = place.home / "failed.json"
        if finished(place.folder):
            return "done", None
        if self.busy(place):
            return "running", None
        if failed.exists():
            return "failed", str(_read(failed).get("message"))
        return "waiting", None

    def failed_since(self, place: Place, when: float) -> bool:
        """Whether a run has failed since a time (of time.time)."""
        failed = place.home / "failed.json"
        return failed.exists() and failed.stat().st_mtime >= when

    def fail(self, place: Place, message: str) -> None:
        """Write down how a try ended."""
        replace_file(place.home / "failed.json", json.dumps({"schema": SCHEMA, "message": message}).encode())

    def outcome(self, plan: Ablation, places: list[Place]) -> Outcome:
        """Read what all runs of an ablation gave so far."""
        return Outcome(plan, tuple(read_result(p.job, p.folder, *self.status(p)) for p in places))

    # The index.

    def update(self, place: Place, result: Result) -> None:
        """Enter one run into the index."""
        with self._database() as (connection, tables):
            _replace(connection, tables["runs"], [_row(place.folder, result)], ("key",))

    def enter_members(self, plan: Ablation, places: list[Place]) -> None:
        """Enter an ablation's list of runs into the index, in place of an earlier one."""
        rows = [_member(plan.name, p.job.variant, p.job.seed, p.job.backend, p.key) for p in places]
        with self._database() as (connection, tables):
            table = tables["members"]
            connection.execute(table.delete().where(table.c.ablation == plan.name))
            connection.execute(table.insert(), rows)

    def rebuild(self) -> int:
        """Make the index again from the folders and return how many runs it has; StoreError names a damaged file."""
        runs = [self._read_row(folder) for folder in sorted((self.path / "runs").glob("*/run"))]
        members = []
        for file in sorted(self.path.glob("ablations/*/members.json")):
            value = _read(file)
            members += [_member(value["ablation"], *row) for row in value["runs"]]
        with self._database() as (connection, tables):
            for table, rows in ((tables["runs"], runs), (tables["members"], members)):
                connection.execute(table.delete())
                if rows:
                    connection.execute(table.insert(), rows)
        return len(runs)

    def rows(self, table: str = "runs") -> list[dict[str, Any]]:
        """Return a table of the index, `runs` or `members`."""
        with self._database() as (connection, tables):
            return [dict(row._mapping) for row in connection.execute(tables[table].select())]

    def _read_row(self, folder: Path) -> dict[str, Any]:
        value = _read(folder.parent / "job.json")
        from core.config import RunConfig, from_json

        try:
            config = from_json(RunConfig, value["config"], f"{folder.parent / 'job.json'}: config")
            job = Job("", config.seed, value["backend"], config, value["dtype"])
            place = Place(job, value["key"], folder)
            return _row(folder, read_result(job, folder, *self.status(place)))
        except (KeyError, ConfigError, RunError) as error:
            raise StoreError(f"{folder}: is not a run of this version ({error}); move it away") from error

    @contextmanager
    def _database(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield a connection in a transaction, and the tables, which are made where they are not there yet."""
        import sqlalchemy as sql
        from sqlalchemy import event, exc, pool

        kinds = {str: sql.Text, int: sql.BigInteger, float: sql.Double}
        meta, tables = sql.MetaData(), {}
        for name, (columns, keys) in TABLES.items():
            made = (sql.Column(c, kinds[kind], primary_key=c in keys) for c, kind in columns.items())
            tables[name] = sql.Table(name, meta, *made)
        if self.database.startswith("sqlite:///"):
            Path(self.database.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            engine = sql.create_engine(self.database, poolclass=pool.NullPool)
            if engine.dialect.name == "sqlite":
                event.listen(engine, "connect", _sqlite_settings)
            with engine.begin() as connection:
                for table in tables.values():  # another process may make them at the same time
                    connection.execute(sql.schema.CreateTable(table, if_not_exists=True))
                yield connection, tables
        except exc.NoSuchModuleError as error:
            raise StoreError(
                f"--database {self.database}: {error}; expected sqlite:///FILE or postgresql+psycopg://..."
            ) from error
        except ModuleNotFoundError as error:
            raise StoreError(f"--database {self.database}: {error}; pip install -e '.[postgresql]'") from error
        except exc.SQLAlchemyError as error:
            line = " ".join(str(error).split())[:300]
            raise StoreError(
                f"{self.database}: {line}; the runs are intact: delete the index and use --rebuild"
            ) from error


def finished(folder: Path) -> bool:
    """Whether a run folder holds a finished run."""
    if not (folder / "config.json").exists():
        return False
    try:
        return Run.open(folder).last("final/artifact") is not None
    except RunError:
        return False


def _sqlite_settings(connection: Any, _: Any) -> None:
    """Several processes may write: a write-ahead log, and patience."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=60000")


def _replace(connection: Any, table: Any, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    import sqlalchemy as sql

    for row in rows:
        same = sql.and_(*(table.c[key] == row[key] for key in keys))
        connection.execute(table.delete().where(same))
        connection.execute(table.insert(), [row])


def _row(folder: Path, result: Result) -> dict[str, Any]:
    """Return a run as a row of the index."""
    job = _read(folder.parent / "job.json")
    made: dict[str, Any] = {name: getattr(result, name, None) for name in COLUMNS}
    made |= {"key": job["key"], "preset": job["config"]["preset"], "seed": job["config"]["seed"], "code": job["code"]}
    made |= {"dtype": job["dtype"], "data": json.dumps(job["data"]), "config": json.dumps(job["config"])}
    return made | {"folder": f"runs/{job['key']}/run"}


def _member(ablation: str, variant: str, seed: int, backend: str, key: str) -> dict[str, Any]:
    return {"ablation": ablation, "variant": variant, "seed": seed, "backend": backend, "key": key}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; move its folder away") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not JSON ({error}); move its folder away") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise StoreError(
            f"{path}: schema {found!r}, expected {SCHEMA}: written by another version; move its folder away"
        )
    return value
