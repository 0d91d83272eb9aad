"""Runs the jobs of an ablation, several at a time, each in a process of its own; what is done is never done again."""

import hashlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from core import PYTHON
from core.ablation.folders import damage, finished
from core.ablation.records import Start
from core.ablation.store import Place, Store
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
        """Let go of what an ended worker used."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.output.close()
        self.lock.close()


class Progress(NamedTuple):
    """What a live table shows."""

    running: tuple[Place, ...]
    done: int
    failed: int
    total: int
    waiting: tuple[Place, ...] = ()
    """Not begun, in order; the rest are trained by other processes."""


class Beside:
    """Counts how many runs ran side by side with each run, look by look."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def look(self, running: Collection[Running]) -> None:
        """Count what runs now."""
        for made in running:
            looks, runs = self._seen.get(made.place.key, (0, 0))
            self._seen[made.place.key] = looks + 1, runs + len(running)

    def end(self, store: Store, made: Running) -> None:
        """Write down what was counted of a run that has ended."""
        looks, runs = self._seen.pop(made.place.key, (1, 1))
        store.end(made.place, round(time.monotonic() - made.began, 3), round(runs / looks, 3))


def run_all(
    store: Store,
    places: Sequence[Place],
    *,
    parallel: int = 1,
    devices: Sequence[str] = (),
    threads: int | None = None,
    worker: Sequence[str] = WORKER,
    started: Callable[[Place], None],
    ended: Callable[[Place], None],
    shown: Callable[[Progress], None],
) -> None:
    """Bring every place to its end: done, or failed once. Runs that other processes train are waited for.

    `started` gets each run before its worker begins (it writes job.json), `ended` when it has ended or was found done;
    `shown` is called a few times a second. An exception (Ctrl-C) ends the workers; their checkpoints stay.
    """
    slots = [Slot(i, devices[i % len(devices)] if devices else None) for i in range(parallel)]
    waiting, elsewhere, running = list(places), [], {}
    done = failed = 0
    beside = Beside()
    looked = time.monotonic()

    def close(place: Place) -> None:
        nonlocal done, failed
        state = store.status(place)[0]
        done, failed = done + (state == "done"), failed + (state == "failed")
        ended(place)

    try:
        while waiting or elsewhere or running:
            for slot in [s for s in slots if s not in running]:
                while waiting and slot not in running:
                    place = waiting.pop(0)
                    made = _start(store, place, Start(HOST, slot.device, threads, parallel), worker, started)
                    if made is not None:
                        running[slot] = made
                    elif store.status(place)[0] == "done":
                        close(place)
                    else:
                        elsewhere.append((place, time.time()))
            beside.look(running.values())
            for slot, made in list(running.items()):
                if made.process.poll() is not None:
                    del running[slot]
                    beside.end(store, made)
                    _finish(store, made)
                    close(made.place)
            if elsewhere and time.monotonic() - looked > ELSEWHERE:
                looked = time.monotonic()
                for place, since in [(p, t) for p, t in elsewhere if not store.busy(p)]:
                    elsewhere.remove((place, since))
                    if store.status(place)[0] == "done" or store.failed_since(place, since):
                        close(place)
                    else:  # whoever held it was killed, or only looked
                        waiting.append(place)
            under_way = tuple(made.place for made in running.values())
            shown(Progress(under_way, done, failed, len(places), tuple(waiting)))
            time.sleep(POLL)
    finally:
        for made in running.values():
            made.process.terminate()
        for made in running.values():
            made.process.wait()
            beside.end(store, made)
            made.close()


def _start(
    store: Store,
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
        variables = {name: value for name, value in os.environ.items() if name != "PGPASSWORD"}  # the index's only
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


def _finish(store: Store, worker: Running) -> None:
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
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][-LAST_WORDS:] if said else ""
