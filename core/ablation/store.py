"""Where the runs of ablations are kept: folders, which are the only record.

STORE/runs/KEY/run/       a run folder
STORE/runs/KEY/           job.json: what was asked for; failed.json: how the last try ended, if badly; worker.txt: what
                          it said; lock: held by whoever trains it; machine.json: where it ran, each time it was started
STORE/ablations/NAME/     members.json (which runs an ablation has), report.html and its pictures
STORE/*/*/lock            of an ablation: held by whoever writes there
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from core.ablation.folders import Stamps, finished, stamps_of
from core.ablation.locks import alone, make
from core.ablation.plan import Ablation, Job, job_key
from core.ablation.records import STORE_SCHEMA, Start, StoreError, is_earlier, read_failure, read_members, starts
from core.ablation.stats.results import Result, Results, Status, read_result
from core.config import to_json
from core.files import FileError, append_file, locked, replace_file
from core.training.run import RunError
from core.training.writer import is_held


class Place(NamedTuple):
    """A job and its folder."""

    job: Job
    key: str
    folder: Path
    """The run folder."""

    @property
    def home(self) -> Path:
        """The folder that holds the run folder and the files beside it."""
        return self.folder.parent


class RunStore:
    """One folder of runs."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{path}: is a file, expected a folder of ablations; choose another --store")
        self._read: dict[Path, tuple[Stamps, Result]] = {}
        """Finished runs that were read, since a long run's metrics take a tenth of a second."""

    def place(self, job: Job, code: str, data: dict[str, str]) -> Place:
        """Return a job's place in the store."""
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
            "schema": STORE_SCHEMA, "key": place.key, "config": to_json(job.config), "backend": job.backend,
            "dtype": job.dtype, "code": code, "data": data, "command": command,
        }  # fmt: skip
        replace_file(place.home / "job.json", json.dumps(value, indent=1).encode())

    def write_members(self, plan: Ablation, places: list[Place]) -> None:
        """Write members.json, the list of an ablation's runs."""
        folder = self.ablation_folder(plan)
        rows = [[p.job.variant, p.job.seed, p.job.backend, p.key] for p in places]
        value = {"schema": STORE_SCHEMA, "ablation": plan.name, "file": os.path.abspath(plan.path), "runs": rows}
        with alone(folder):
            replace_file(folder / "members.json", json.dumps(value, indent=1).encode())

    def check_name(self, plan: Ablation) -> None:
        """Raise StoreError if the store has an ablation of this name that another file describes.

        A file that is gone was moved, or the store was: on a Mac one file also has two names, /tmp and /private/tmp.
        """
        file = self.ablation_folder(plan) / "members.json"
        if file.exists():
            before, _ = read_members(file)
            if os.path.exists(before) and not os.path.samefile(before, plan.path):
                raise StoreError(
                    f"{plan.path}: name: {plan.name!r} is that of {before} in {self.path}: give it another name"
                )

    def earlier(self, plan: Ablation) -> int:
        """Return how many runs of an ablation are of a version before schema 3: they are read, not continued."""
        file = self.ablation_folder(plan) / "members.json"
        return sum(is_earlier(self.path / "runs" / key) for key in read_members(file)[1]) if file.exists() else 0

    def begin(self, place: Place, start: Start) -> None:
        """Add a start to a run's machine.json."""
        self._write_starts(place, [*starts(place.home), start])

    def end(self, place: Place, seconds: float, beside: float) -> None:
        """Complete a run's last start: how long it took, and how many runs ran side by side with it on average."""
        *before, last = starts(place.home) or (Start(),)
        self._write_starts(place, [*before, last._replace(seconds=seconds, beside=beside)])

    def _write_starts(self, place: Place, history: list[Start]) -> None:
        value = {"schema": STORE_SCHEMA, "starts": [one._asdict() for one in history]}
        replace_file(place.home / "machine.json", json.dumps(value, indent=1).encode())

    @contextmanager
    def held(self, place: Place) -> Iterator[BinaryIO | None]:
        """Hold a run against every other process; None where another one holds it. It is inherited by a worker."""
        make(place.home)
        with append_file(place.home / "lock") as file:
            yield file if locked(file) else None

    def busy(self, place: Place) -> bool:
        """Return whether a process trains a run now."""
        return is_held(place.home)

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
        """Return whether a run has failed since `when` (time.time)."""
        failed = place.home / "failed.json"
        return failed.exists() and failed.stat().st_mtime >= when

    def fail(self, place: Place, message: str) -> None:
        """Write failed.json: why a try ended."""
        replace_file(place.home / "failed.json", json.dumps({"schema": STORE_SCHEMA, "message": message}).encode())

    def outcome(self, plan: Ablation, places: list[Place]) -> Results:
        """Read what all runs of an ablation gave so far; one whose folder is damaged counts as failed."""
        return Results(plan, tuple(map(self._result, places)))

    def _result(self, place: Place) -> Result:
        job = place.job
        state, message = self.status(place)
        stamps = stamps_of(place.folder)
        before, result = self._read.get(place.folder, (None, None))
        if state == "done" and result is not None and before == stamps:  # another variant's name may ask for it now
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
