"""Runs the jobs of an ablation, several at a time, each in a process of its own; finished runs are never repeated."""

import hashlib
import os
import platform
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import IO, NamedTuple

from core import PYTHON
from core.ablation.folders import damage, finished
from core.ablation.records import Start
from core.ablation.store import Place, RunStore
from core.files import FileError, append_file, open_file, replace_file

WORKER = (*PYTHON, "-m", "core.verbs.ablation_worker")
POLL = 0.2
"""Seconds between two looks at the workers."""
ELSEWHERE = 2.0
"""Seconds between two looks at runs that another process trains."""
HOST = hashlib.sha256(platform.node().partition(".")[0].encode()).hexdigest()[:8]
"""Tells machines apart without naming them; what follows the first dot changes where a Mac changes its network."""
LIBRARIES = ("OMP_NUM", "MKL_NUM", "OPENBLAS_NUM", "VECLIB_MAXIMUM")
"""Variables NAME_THREADS that say how many threads a worker uses; the last one is that of Accelerate on a Mac."""
LAST_WORDS = 600
"""Characters of a failed run's last line that are kept."""


class Slot(NamedTuple):
    """Where one worker at a time runs."""

    number: int
    device: str | None
    """CUDA_VISIBLE_DEVICES of its workers; None: as it is."""


class Running(NamedTuple):
    """A worker."""

    place: Place
    process: subprocess.Popen
    output: IO[bytes]
    lock: ExitStack
    began: float
    """Of time.monotonic."""

    def close(self) -> None:
        """Close the files of an ended worker, which releases its lock."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.output.close()
        self.lock.close()


class RunnerProgress(NamedTuple):
    """What a live table shows."""

    running: tuple[Place, ...]
    done: int
    failed: int
    total: int
    waiting: tuple[Place, ...] = ()
    """Not begun, in order; the rest are trained by other processes."""


def run_all(
    store: RunStore,
    places: Sequence[Place],
    *,
    parallel: int = 1,
    devices: Sequence[str] = (),
    threads: int | None = None,
    worker: Sequence[str] = WORKER,
    started: Callable[[Place], None],
    ended: Callable[[Place], None],
    shown: Callable[[RunnerProgress], None],
) -> None:
    """Train every run until it is done or has failed once; wait for runs that other processes train.

    `started` gets each run before its worker begins (it writes job.json), `ended` when it has ended or was found done;
    `shown` is called a few times a second. An exception (Ctrl-C) ends the workers; their checkpoints stay.
    """
    slots = [Slot(i, devices[i % len(devices)] if devices else None) for i in range(parallel)]
    workers = _Workers(store, places, slots, threads, worker, started, ended)
    try:
        while workers.busy:
            workers.start()
            workers.collect()
            workers.look_elsewhere()
            shown(workers.progress())
            time.sleep(POLL)
    finally:
        workers.stop()


class _Workers:
    """The workers under way, the runs that wait for one, and those that other processes train."""

    def __init__(
        self, store: RunStore, places: Sequence[Place], slots: list[Slot], threads: int | None, worker: Sequence[str],
        started: Callable[[Place], None], ended: Callable[[Place], None],
    ) -> None:  # fmt: skip
        self._store, self._slots, self._threads, self._worker = store, slots, threads, worker
        self._started, self._ended = started, ended
        self._total, self._waiting = len(places), list(places)
        self._elsewhere: list[tuple[Place, float]] = []
        """(run, time of time.time since when another process is known to have it)."""
        self._running: dict[Slot, Running] = {}
        self._looked = time.monotonic()
        self._counts: Counter[str] = Counter()
        """Runs that have ended, by status."""
        self._company: dict[str, list[int]] = {}
        """Key of a run -> how many ran side by side at each look since it began, itself among them."""

    @property
    def busy(self) -> bool:
        """Whether a run has not ended yet."""
        return bool(self._waiting or self._elsewhere or self._running)

    def start(self) -> None:
        """Start a waiting run in every free slot."""
        for slot in [slot for slot in self._slots if slot not in self._running]:
            while self._waiting and slot not in self._running:
                place = self._waiting.pop(0)
                how = Start(HOST, slot.device, self._threads, len(self._slots))
                running = _start(self._store, place, how, self._worker, self._started)
                if running is not None:
                    self._running[slot] = running
                elif self._store.status(place)[0] == "done":
                    self._end(place)
                else:
                    self._elsewhere.append((place, time.time()))

    def collect(self) -> None:
        """Count who runs side by side, and close the workers that have ended."""
        for running in self._running.values():
            self._company.setdefault(running.place.key, []).append(len(self._running))
        for slot, running in list(self._running.items()):
            if running.process.poll() is not None:
                del self._running[slot]
                self._record(running)
                _finish(self._store, running)
                self._end(running.place)

    def look_elsewhere(self) -> None:
        """Take back now and then the runs that no other process trains any more."""
        if not self._elsewhere or time.monotonic() - self._looked <= ELSEWHERE:
            return
        self._looked = time.monotonic()
        for place, since in [(p, t) for p, t in self._elsewhere if not self._store.busy(p)]:
            self._elsewhere.remove((place, since))
            if self._store.status(place)[0] == "done" or self._store.failed_since(place, since):
                self._end(place)
            else:  # whoever held it was killed, or only looked
                self._waiting.append(place)

    def progress(self) -> RunnerProgress:
        """Return where things stand."""
        running = tuple(running.place for running in self._running.values())
        return RunnerProgress(running, self._counts["done"], self._counts["failed"], self._total, tuple(self._waiting))

    def stop(self) -> None:
        """End the workers that are still under way."""
        for running in self._running.values():
            running.process.terminate()
        for running in self._running.values():
            running.process.wait()
            self._record(running)
            running.close()

    def _record(self, running: Running) -> None:
        """Write down how long a worker took and how many runs ran beside it, on average."""
        company = self._company.pop(running.place.key, [1])
        self._store.end(running.place, round(time.monotonic() - running.began, 3), round(fmean(company), 3))

    def _end(self, place: Place) -> None:
        self._counts[self._store.status(place)[0]] += 1
        self._ended(place)


def _start(
    store: RunStore,
    place: Place,
    how: Start,
    worker: Sequence[str],
    started: Callable[[Place], None],
) -> Running | None:
    """Start the worker of a run; None if it is done already or another process has it."""
    with ExitStack() as stack:
        lock = stack.enter_context(store.held(place))
        if lock is None:
            return None
        if finished(place.folder):
            return None
        started(place)
        store.begin(place, how)
        (place.home / "failed.json").unlink(missing_ok=True)
        variables = dict(os.environ)
        if how.threads is not None:
            variables |= {f"{library}_THREADS": str(how.threads) for library in LIBRARIES}
        if how.device is not None:
            variables["CUDA_VISIBLE_DEVICES"] = how.device
        replace_file(place.home / "worker.txt")
        output = append_file(place.home / "worker.txt")
        process = subprocess.Popen(
            [*worker, str(place.home)],
            stdin=subprocess.PIPE,  # its end tells the worker that this process is gone
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            pass_fds=(lock.fileno(),),  # the worker holds the run, whatever becomes of this process
        )
        return Running(place, process, output, stack.pop_all(), time.monotonic())


def _finish(store: RunStore, worker: Running) -> None:
    """Write down how a worker ended."""
    code = worker.process.returncode
    if not finished(worker.place.folder):
        last = damage(worker.place.folder) or _last_line(worker.place.home / "worker.txt")
        if code < 0:  # what it said last is no reason then
            why = f"ended by signal {-code} ({signal.strsignal(-code) or 'unknown'})"
            why += ", often for want of memory" if code == -signal.SIGKILL else ""
            last = f"{why}; said last: {last}" if last else why
        store.fail(worker.place, last or f"ended with code {code} and said nothing")
    worker.close()


def _last_line(path: Path) -> str:
    """Return the last line that a worker said."""
    try:
        with open_file(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            lines = file.read().decode(errors="replace").split("\n")
    except (OSError, FileError):
        return ""
    texts = [line.strip() for line in lines if line.strip()]
    return texts[-1][-LAST_WORDS:] if texts else ""
