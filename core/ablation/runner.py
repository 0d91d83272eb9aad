"""Runs the jobs of an ablation, several at a time, each in a process; finished runs are never repeated.

A process trains one seed of a variant after the other, so that what it compiled is used again; where one fails or is
killed, the next seed gets a new process.
"""

import hashlib
import os
import platform
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import BinaryIO, NamedTuple

from core import PYTHON
from core.ablation.folders import damage, finished
from core.ablation.plan import Job
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
LAST_BYTES = 20_000
"""Bytes at the end of a worker's output in which that line is looked for."""


class Slot(NamedTuple):
    """Where one worker at a time runs."""

    number: int
    device: str | None
    """CUDA_VISIBLE_DEVICES of its workers; None: as it is."""


class RunWorker(NamedTuple):
    """A process that trains runs of one kind, one after the other."""

    process: subprocess.Popen
    line: socket.socket
    """Its other end is the process's standard input: what goes there are orders, what comes back is how a run ended."""

    def ended(self) -> bool:
        """Return whether the run under way has ended, or the process with it."""
        with suppress(OSError):  # nothing is there yet, or the process was killed before it read its order
            if self.line.recv(64, socket.MSG_DONTWAIT):
                return True
        return self.process.poll() is not None

    def close(self) -> None:
        """Tell the process that nothing more comes, which ends it."""
        self.line.close()
        self.process.wait()


class Running(NamedTuple):
    """A run under way."""

    place: Place
    worker: RunWorker
    output: BinaryIO
    lock: ExitStack
    began: float
    """Of time.monotonic."""

    def close(self) -> None:
        """Close the files of an ended run, which releases its lock."""
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
        self._idle: dict[Slot, tuple[Job, RunWorker]] = {}
        """Workers that have ended a run, and which."""
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
                place = self._next(slot)
                how = Start(HOST, slot.device, self._threads, len(self._slots))
                running = _start(self._store, place, how, partial(self._free, slot), self._worker, self._started)
                if running is not None:
                    self._running[slot] = running
                elif self._store.status(place)[0] == "done":
                    self._end(place)
                else:
                    self._elsewhere.append((place, time.time()))
            self._dismiss(slot)

    def _next(self, slot: Slot) -> Place:
        """Take a waiting run: of the kind that the slot's worker knows, else of one that no other slot trains."""
        known, _ = self._idle.get(slot, (None, None))
        others = [running.place.job for running in self._running.values()]

        def rank(i: int) -> tuple[bool, bool]:
            job = self._waiting[i].job
            return not (known and _alike(job, known)), any(_alike(job, other) for other in others)

        place = self._waiting.pop(min(range(len(self._waiting)), key=rank))
        if known is not None and not _alike(place.job, known):
            self._dismiss(slot)
        return place

    def _free(self, slot: Slot) -> RunWorker | None:
        """Return the worker that waits in a slot, if there is one."""
        return self._idle.pop(slot, (None, None))[1]

    def _dismiss(self, slot: Slot) -> None:
        """End the worker that waits in a slot, if there is one."""
        if (worker := self._free(slot)) is not None:
            worker.close()

    def collect(self) -> None:
        """Count who runs side by side, and close the workers that have ended."""
        for running in self._running.values():
            self._company.setdefault(running.place.key, []).append(len(self._running))
        for slot, running in list(self._running.items()):
            if running.worker.ended():
                del self._running[slot]
                self._record(running)
                _finish(self._store, running)
                self._end(running.place)
                if running.worker.process.poll() is None:
                    self._idle[slot] = running.place.job, running.worker
                else:
                    running.worker.close()

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
        for slot in self._slots:
            self._dismiss(slot)
        for running in self._running.values():
            running.worker.process.terminate()
        for running in self._running.values():
            running.worker.process.wait()
            running.worker.close()
            self._record(running)
            running.close()

    def _record(self, running: Running) -> None:
        """Write down how long a worker took and how many runs ran beside it, on average."""
        company = self._company.pop(running.place.key, [1])
        self._store.end(running.place, round(time.monotonic() - running.began, 3), round(fmean(company), 3))

    def _end(self, place: Place) -> None:
        self._counts[self._store.status(place)[0]] += 1
        self._ended(place)


def _alike(job: Job, other: Job) -> bool:
    """Return whether two runs differ in their seeds alone: what one compiles the other needs."""
    same = (job.backend, job.dtype) == (other.backend, other.dtype)
    return same and replace(job.config, seed=other.config.seed) == other.config


def _start(
    store: RunStore, place: Place, how: Start, free: Callable[[], RunWorker | None], worker: Sequence[str],
    started: Callable[[Place], None],
) -> Running | None:  # fmt: skip
    """Start a run, in the process that is `free` or else a new one; None if it is done or another process has it."""
    with ExitStack() as stack:
        lock = stack.enter_context(store.held(place))
        if lock is None:
            return None
        if finished(place.folder):
            return None
        started(place)
        store.begin(place, how)
        (place.home / "failed.json").unlink(missing_ok=True)
        replace_file(place.home / "worker.txt")
        output = stack.enter_context(append_file(place.home / "worker.txt"))
        ready = free()
        if ready is None or not _order(ready, place, lock, output):
            ready = _new_worker(place, how, lock, output, worker)
        return Running(place, ready, output, stack.pop_all(), time.monotonic())


def _new_worker(place: Place, how: Start, lock: BinaryIO, output: BinaryIO, command: Sequence[str]) -> RunWorker:
    """Start a process that trains a run first."""
    variables = dict(os.environ)
    if how.threads is not None:
        variables |= {f"{library}_THREADS": str(how.threads) for library in LIBRARIES}
    if how.device is not None:
        variables["CUDA_VISIBLE_DEVICES"] = how.device
    ours, theirs = socket.socketpair()  # its end tells the worker that this process is gone
    with theirs:
        process = subprocess.Popen(
            [*command, str(place.home), str(lock.fileno())],
            stdin=theirs.fileno(),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            pass_fds=(lock.fileno(),),  # the worker holds the run, whatever becomes of this process
        )
    return RunWorker(process, ours)


def _order(worker: RunWorker, place: Place, lock: BinaryIO, output: BinaryIO) -> bool:
    """Give a run to a worker that waits, with the files that it needs; False if the worker has died meanwhile."""
    with suppress(OSError):
        if worker.process.poll() is None:
            socket.send_fds(worker.line, [os.fsencode(place.home) + b"\0"], [lock.fileno(), output.fileno()])
            return True
    worker.close()
    return False


def _finish(store: RunStore, running: Running) -> None:
    """Write down how a run ended."""
    code, place = running.worker.process.returncode, running.place
    if not finished(place.folder):
        last = damage(place.folder) or _last_line(place.home / "worker.txt")
        if code is not None and code < 0:  # what it said last is no reason then
            why = f"ended by signal {-code} ({signal.strsignal(-code) or 'unknown'})"
            why += ", often for want of memory" if code == -signal.SIGKILL else ""
            last = f"{why}; said last: {last}" if last else why
        store.fail(place, last or f"ended{'' if code is None else f' with code {code}'} and said nothing")
    running.close()


def _last_line(path: Path) -> str:
    """Return the last line that a worker said."""
    try:
        with open_file(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
            lines = file.read(LAST_BYTES).decode(errors="replace").split("\n")
    except (OSError, FileError):
        return ""
    texts = [line.strip() for line in lines if line.strip()]
    return texts[-1][-LAST_WORDS:] if texts else ""
