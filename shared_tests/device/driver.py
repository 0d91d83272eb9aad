"""Runs the items of a check one after the other, within a budget, and keeps what they wrote. Imports no framework."""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared_tests.device import records
from shared_tests.device.child import NO_DEVICE
from shared_tests.device.plan import PLANS, Item
from shared_tests.device.report import write_report

MOST = 16 << 20
"""Bytes of a file that may be left in the folder."""
AFTER_A_CRASH = 60.0
"""Seconds after which a check ends whose smoke item crashed: what crashed is to be mended first."""
REHEARSED = 20.0
"""Seconds that must be left for an item without a GPU."""
CACHE, BUNDLE = "cache.bin", "report.zip"
Say = Callable[[str], None]


@dataclass
class Running:
    """An item's process."""

    item: Item
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        """End it and every process that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead device cannot be ended
            self.process.wait(5)


class Driver:
    """One call of a check."""

    def __init__(
        self,
        title: str,
        items: Sequence[Item],
        command: Sequence[str],
        folder: Path,
        budget: float,
        gpu: bool,
        say: Say,
    ) -> None:
        """`command` starts an item: it gets the item's name, the folder, a temporary folder and the device behind."""
        self.title, self.items, self.command, self.folder, self.gpu, self.say = title, items, command, folder, gpu, say
        self.began, self.budget, self.no_device = time.monotonic(), budget, False
        self.preparing: dict[str, Running] = {}
        folder.mkdir(parents=True, exist_ok=True)
        records.mend(folder)
        lines = records.read(folder)
        states = {name: records.state(run) for name, run in records.latest(lines).items()}
        results = {name for name, state in states.items() if state in records.ENDED}
        # What was skipped for want of something is run once that is there.
        self.ended = results - {i.name for i in items if states.get(i.name) == "skipped" and not self._wants(i)}
        self.pending = [item for item in items if item.name not in self.ended]
        self.go_on = self.rehearsal = False

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.began)

    def run(self) -> int:
        """Run what has no result yet; return 0, 1 (something is wrong or was not reached) or 2 (there is no device)."""
        if skipped := len(self.items) - len(self.pending):
            self.say(f"{skipped} items have a result in {self.folder} and are not run again")
        with tempfile.TemporaryDirectory(prefix="skc-check-") as folder:
            self.temporary = Path(folder)
            self._unpack()
            try:
                while self.pending and not self.no_device and self._step():
                    pass
            finally:
                for running in self.preparing.values():
                    running.end()
                self._report()
                self._bundle()
                self._pack()  # last: it speaks, and who listened may be gone
        if self.no_device:
            return 2
        for item in self.pending:
            self.say(f"not started, {self.left:.0f} s are left of {self.budget:.0f}: {item.name}")
        runs = records.latest(records.read(self.folder))
        wrong = any(True for item in self.items for _ in records.bad(runs.get(item.name, [])))
        return 1 if wrong or any(not item.optional for item in self.pending) else 0

    def _step(self) -> bool:
        """Run the first item that can be run, or wait; False: none can be any more."""
        for item in list(self.pending):
            if want := self._wants(item):
                self._close(item, "skipped", text=want)
            elif item.prepares and item.name not in self.preparing and self._may_prepare(item):
                self.preparing[item.name] = self._start(item)
        self._reap()
        waiting = False
        for item in self.pending:
            if not self._fits(item):
                continue
            if not item.prepares or (self.temporary / f"{item.name}.ready").exists():
                self._conduct(item)
                return True
            waiting = waiting or item.name in self.preparing
        time.sleep(0.05)
        return waiting

    def _wants(self, item: Item) -> str:
        """Return what an item needs that is not here, and how to get it, or nothing."""
        if item.gpu_only and not self.gpu:
            return "needs a GPU"
        missing = [name for name in item.needs if importlib.util.find_spec(name) is None]
        extras = ",".join(["mlx", *missing])
        how = f"{sys.executable} -m pip install -c constraints.txt -e '.[{extras}]'"
        return f"needs {' and '.join(missing)}: skipped; {how}" if missing else ""

    def _may_prepare(self, item: Item) -> bool:
        before = {other.name for other in self.items} & set(item.after)
        return self._fits(item) and self.ended >= before

    def _fits(self, item: Item) -> bool:
        """Return whether an item may start: the limits are a GPU machine's; a rehearsal only keeps to the budget."""
        return self.left >= (min(item.cap, REHEARSED) if self.rehearsal else item.cap)

    def _start(self, item: Item) -> Running:
        """Start an item's process, in a session of its own."""
        device = records.device(self.gpu)
        records.append(self.folder, {"item": item.name, "state": "started", "device": device})
        variables = {**os.environ, **item.environment}
        if not self.gpu:
            variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **item.cpu}
        given = [item.name, str(self.folder), str(self.temporary), device]
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*self.command, *given], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables,
                start_new_session=True,
            )  # fmt: skip
        return Running(item, process)

    def _reap(self) -> None:
        """Close the items that ended while they prepared."""
        for running in list(self.preparing.values()):
            if running.process.poll() is not None and not self._ready(running.item):
                running.end()
                self._close(running.item, "failed", text=f"ended with code {running.process.poll()} before its turn")

    def _ready(self, item: Item) -> bool:
        return (self.temporary / f"{item.name}.ready").exists()

    def _conduct(self, item: Item) -> None:
        """Give an item its turn, and end it when its time is over."""
        began = time.monotonic()
        if item.prepares:
            running = self.preparing[item.name]
            (self.temporary / f"{item.name}.go").touch()
        else:
            running = self._start(item)
        cap = max(item.cap, self.left) if self.rehearsal else item.cap
        try:
            code = running.process.wait(cap)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            running.end()  # also where this process is told to end: a session of its own hears nothing of that
        seconds = time.monotonic() - began
        if code is None:
            self._close(item, "capped", text=f"capped after {cap:g} s", seconds=seconds)
        elif code == NO_DEVICE:
            self.no_device = True
        else:
            more = {} if code in (0, 1) else {"text": f"ended with code {code}"}
            self._close(item, "failed" if code else "done", seconds=seconds, **more)

    def _close(self, item: Item, state: str, **more: object) -> None:
        """Write an item's end, say what came of it, and bring the report up to date."""
        self.pending.remove(item)
        self.preparing.pop(item.name, None)
        self.ended.add(item.name)
        records.append(self.folder, {"item": item.name, "state": state, "at": time.monotonic() - self.began, **more})
        run = records.latest(records.read(self.folder))[item.name]
        bad = list(records.bad(run))
        why = f" ({more['text']})" if "text" in more else ""
        self.say(f"[{time.monotonic() - self.began:5.1f} s] {item.name}: {state}{why}")
        for line in bad:
            if "what" in line:
                self.say(f"    {line['what']}: {line.get('error') or _gap(line)}")
        if item.name == "smoke" and any("traceback" in line for line in bad):
            for line in bad:
                self.say(line.get("traceback", ""))
            if not self.go_on:
                self.budget = min(self.budget, AFTER_A_CRASH)
                self.say(f"a model crashes: ending after {AFTER_A_CRASH:g} s (--go-on: run everything)")
        self._report()

    def _report(self) -> None:
        write_report(self.folder, self.title, [item.name for item in self.items])
        for name in ("log.txt", "profiles.txt"):
            path = self.folder / name
            if path.exists() and path.stat().st_size > MOST // 2:  # what is there longest goes; appending goes on
                kept = path.read_bytes()[-(MOST // 4) :]
                os.truncate(path, 0)
                with path.open("ab") as file:
                    file.write(kept)

    def _bundle(self) -> None:
        """Put what people read into one file, which can be attached to a report."""
        with zipfile.ZipFile(self.folder / BUNDLE, "w", zipfile.ZIP_DEFLATED) as file:
            for name in ("report.md", records.FILE, "profiles.txt", "log.txt"):
                if (self.folder / name).exists():
                    file.write(self.folder / name, name)

    def _unpack(self) -> None:
        """Give what was compiled in an earlier call to the items."""
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(self.folder / CACHE) as kept:
            for name in kept.namelist():
                (self.temporary / Path(name).name).write_bytes(kept.read(name))

    def _pack(self) -> None:
        """Keep what items compiled for a later call, as far as it fits."""
        made = sorted(self.temporary.glob("*.compiled"), key=lambda path: path.stat().st_size)
        if not made:
            return
        target = self.temporary / CACHE
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            for path in made:
                before = target.stat().st_size
                if before + path.stat().st_size <= MOST - (1 << 16):
                    file.write(path, path.name)
                    file.fp.flush()  # pyright: ignore[reportOptionalMemberAccess]
        shutil.copyfile(target, self.folder / CACHE)
        self.say(f"{CACHE}: {len(made)} items' compiled code, {target.stat().st_size:,} bytes")


def _gap(line: records.Line) -> str:
    return f"{line.get('gap')} beyond {line.get('limit')}"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, and a terminal that is closed, end this process as Ctrl-C does: its items end with it."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(backend: str, kind: str, doc: str | None) -> int:
    """Be the script: read its options and run the plan of a backend."""
    name = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / name, metavar="DIR")
    parser.add_argument("--budget", type=float, default=480 if backend == "cuda" else 1800, metavar="SECONDS")
    parser.add_argument("--device", choices=["cuda", "cpu"] if backend == "cuda" else ["gpu", "metal", "cpu"])
    parser.add_argument("--only", nargs="+", metavar="ITEM", choices=[item.name for item in PLANS[backend]])
    parser.add_argument("--again", action="store_true", help="forget what is in DIR")
    parser.add_argument("--go-on", action="store_true", help="run everything although the smoke item crashed")
    options = parser.parse_args()
    items = [item for item in PLANS[backend] if not options.only or item.name in options.only]
    if options.again:
        (options.out / records.FILE).unlink(missing_ok=True)
    title = f"scripts/{' '.join([name, *sys.argv[1:]])}"
    command = [sys.executable, "-m", "shared_tests.device.child", backend]
    gpu = options.device != "cpu"
    if records.device(not gpu) in records.devices(options.out):
        whose = "a rehearsal (--device cpu)" if gpu else "a GPU"
        where = f"{options.out} holds results of {whose}"
        print(f"{name}: {where}: choose another --out, or forget them with --again", file=sys.stderr)
        return 2
    with ended_by_signals():
        driver = Driver(title, items, command, options.out, options.budget, gpu, lambda line: print(line, flush=True))
        driver.go_on = options.go_on
        driver.rehearsal = not gpu
        try:
            code = driver.run()
        except KeyboardInterrupt:
            print(f"stopped: the same command goes on from {options.out}", file=sys.stderr)
            return 1
    if code == 2:
        print(f"there is no {kind} here: nothing was checked (--device cpu tries the script without)", file=sys.stderr)
        return 2
    print(f"wrote {options.out / 'report.md'}; to send, all of it in one file: {options.out / BUNDLE}")
    return code
