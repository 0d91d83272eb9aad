"""One item of a check in a process of its own: what it measured goes to results.jsonl at once.

`python -m shared_tests.device.child BACKEND ITEM FOLDER TEMPORARY DEVICE` is not for people.
"""

import contextlib
import fcntl
import importlib
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared_tests.device import records
from shared_tests.device.plan import PLANS, Item

NO_DEVICE = 3
"""Exit code of an item that found no accelerator where one was asked for."""
LOCK = Path(tempfile.gettempdir()) / "skc-device.lock"
"""Held while something is timed, by any check on this machine."""


class Child:
    """What an item measures with, and where it writes."""

    def __init__(self, backend: str, item: Item, folder: Path, temporary: Path, gpu: bool) -> None:
        self.backend, self.item, self.folder, self.temporary, self.gpu = backend, item, folder, temporary, gpu

    def write(self, what: str, **more: Any) -> None:
        """Write a line of results."""
        records.append(self.folder, {"item": self.item.name, "what": what, **more})

    def figure(self, what: str, value: float, unit: str) -> float:
        """Write a figure and return it."""
        self.write(what, value=float(value), unit=unit)
        return value

    def text(self, what: str, text: str) -> None:
        """Write something that is no number."""
        self.write(what, text=text)

    def check(self, what: str, gap: float, limit: float) -> None:
        """Write a gap and whether it is within its limit; NaN is not."""
        self.write(what, gap=float(gap), limit=limit, ok=bool(gap <= limit))

    def only_gpu(self, what: str) -> bool:
        """Return whether there is a GPU; if not, say that this part needs one."""
        if not self.gpu:
            self.text(what, "needs a GPU")
        return self.gpu

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Let a part fail without those after it: its traceback is a result."""
        try:
            yield
        except Exception as error:  # of a compiler, a driver, a kernel
            traceback.print_exc()
            message = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            self.write(what, error=message, traceback=traceback.format_exc()[-6000:])

    def earlier(self, item: str, what: str) -> float | None:
        """Return a figure of another item, if there is one."""
        run = records.latest(records.read(self.folder)).get(item, [])
        return next((line.get("value") for line in run if line.get("what") == what), None)

    def profile(self, text: str) -> None:
        """Append to profiles.txt."""
        with (self.folder / "profiles.txt").open("a") as file:
            file.write(text)

    def turn(self) -> None:
        """Say that all is compiled, and wait until nothing else is measured."""
        (self.temporary / f"{self.item.name}.ready").touch()
        while not (self.temporary / f"{self.item.name}.go").exists():
            time.sleep(0.05)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Time something while no other check times anything on this machine."""
        with LOCK.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def milliseconds(self, work: Callable[[], Any], repeats: int = 30) -> float:
        """Return the median time of `work` on the device, after three runs to warm up."""
        repeats, times = repeats if self.gpu else 2, []
        for _ in range(3 if self.gpu else 1):
            work()
        if not self.gpu:
            for _ in range(repeats):
                start = time.perf_counter()
                work()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times)
        import torch

        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)


def die_with_the_driver() -> None:
    """Let this process end when the driver is killed: nothing may hold the device after that."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return
    driver = os.getppid()

    def look() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _start_mlx(gpu: bool) -> None:
    """Import MLX as the engine does; without `gpu` everything runs on the CPU, on a Mac as well."""
    importlib.import_module("backends.mlx.blas").load_fast_blas()
    if not gpu:
        import mlx.core as mx

        mx.set_default_device(mx.cpu)


def main(backend: str, name: str, folder: str, temporary: str, device: str) -> int:
    """Run an item."""
    die_with_the_driver()
    item = next(item for item in PLANS[backend] if item.name == name)
    child = Child(backend, item, Path(folder), Path(temporary), device != "cpu")
    module, function = item.call.split(".")
    before = len(records.read(child.folder))
    with child.part(name):
        if backend == "mlx":
            _start_mlx(child.gpu)
        code = getattr(importlib.import_module(f"shared_tests.device.{module}"), function)(child, **item.given)
        if code is not None:
            return code
    mine = [line for line in records.read(child.folder)[before:] if line["item"] == name]
    return 1 if any(records.bad(mine)) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
