"""The runs of one variant of an ablation, one after the other, in a process of their own; not for people.

`python -m core.verbs.ablation_worker FOLDER [LOCK]` reads FOLDER/job.json, trains in FOLDER/run or goes on there. Where
its standard input is a socket, it then writes how that ended and waits for the next run, for which the engine and all
that it has compiled are used again. It ends when whoever started it is gone.
"""

import dataclasses
import os
import queue
import socket
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from core.ablation.records import JobFile, read_job
from core.console import Console
from core.engine.kept import KeptEngine
from core.training.environment import code_version
from core.verbs.common import Context
from core.verbs.errors import is_users, message
from core.verbs.train import Train, train_run

GONE = 75
"""Exit code of a worker whose parent is gone."""
END = b"\0"
"""Ends a message: no path has it."""
BLOCK = 4096


class Order(NamedTuple):
    """A run that is asked for."""

    folder: Path
    lock: int | None
    """File descriptor of its lock, which this process holds with whoever started it until the run has ended."""


def train_options(job: JobFile, folder: Path) -> Train:
    """Return the options of `skc train` for what job.json says."""
    options = Train.of(job.config)
    return dataclasses.replace(options, backend=job.backend, dtype=job.dtype, out=str(folder / "run"))


def main() -> int:
    """Train what is asked for, until nothing is; return how the last run ended."""
    kept = KeptEngine()
    return take_orders(lambda folder: _train(folder, kept))


def _train(folder: Path, kept: KeptEngine) -> int:
    """Train one run; 2 and one line where the settings do not work, 1 where a check failed."""
    try:
        job = read_job(folder)
        if job.code != code_version():
            print("the code in core/ or backends/ has changed since this ablation was started: start it again")
            return 2
        outcome = train_run(train_options(job, folder), Context(Console(), job.command, kept.load))
    except (ValueError, ArithmeticError, OSError) as error:
        if not is_users(error):
            raise
        print(message(error), flush=True)
        return 2
    return 0 if outcome.ok else 1


def take_orders(train: Callable[[Path], int]) -> int:
    """Call `train` for every run that is asked for, and return what it returned last.

    A run that fails ends the process: the runs after it get a fresh one.
    """
    line = socket.socket(fileno=os.dup(0)) if stat.S_ISSOCK(os.fstat(0).st_mode) else None
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, orders), daemon=True).start()
    order = Order(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    while True:
        try:
            code = train(order.folder)
        except KeyboardInterrupt:  # a checkpoint was made, if training was under way
            return 130
        sys.stdout.flush()
        if line is None or code > 1:
            return code
        if order.lock is not None:
            os.close(order.lock)
        line.sendall(b"%d\n" % code)
        order = orders.get()


def _listen(line: socket.socket | None, orders: queue.SimpleQueue[Order]) -> None:
    """Take orders, with the files that come with them; end this process when whoever sends them is gone."""
    if line is None:
        sys.stdin.read()
        os._exit(GONE)
    while True:
        try:
            text, files, _, _ = socket.recv_fds(line, BLOCK, 2)
            while text and not text.endswith(END):
                more = line.recv(BLOCK)
                text = text + more if more else b""
        except ConnectionError:  # it was killed before it read our last answer
            text = b""
        if not text:
            os._exit(GONE)
        lock, output = files
        for standard in (1, 2):
            os.dup2(output, standard)
        os.close(output)
        orders.put(Order(Path(os.fsdecode(text[: -len(END)])), lock))


if __name__ == "__main__":
    sys.exit(main())
