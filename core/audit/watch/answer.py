"""Waits for a watched process, ends it where it goes on or does not answer, and reads its answer."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.watch.strace import followed
from core.files import MAX_TEXT, read_file, read_json
from core.formats.kinds import ANYTHING, Leaf, check_value, or_null

DIED = "died"
"""Kind of the error of a process that ended without an answer."""
KEPT = re.compile(
    r"PATH|LD_LIBRARY_PATH|TZ|USER|LOGNAME|CC|CXX|CUDA_(HOME|PATH|VISIBLE_DEVICES|DEVICE_ORDER)|NVIDIA_\w+|MLX_\w+"
    r"|(OMP|MKL|OPENBLAS|NUMEXPR|VECLIB|GOTO|KMP)_\w+"
)
"""Environment variables that say what the machine is; no others reach the process."""
LONGEST = {"PATH": 4096, "LD_LIBRARY_PATH": 4096}
"""Characters of a variable's value, else 256: a text does not fit."""
MOST = 40
"""Of these variables."""
GRACE = 10.0
"""Seconds that the processes have to end once the answer is there."""
PATIENCE = 86_400.0
"""Seconds until an evaluation without an answer is ended."""


TEXT = Leaf("a text", lambda value: isinstance(value, str))
ERROR = or_null(Leaf("an error", lambda e: type(e) is dict and {"kind", "message", "traceback"} <= e.keys()))
OPENING = Leaf("an opening", lambda value: type(value) is list and list(map(type, value)) == [str, int, bool])
RESPONSE = {
    "value": ANYTHING, "error": ERROR,
    "events": {"opened": [OPENING], "network": [TEXT], "executed": [TEXT], "*": ANYTHING},
    "announced": [TEXT], "modules": [TEXT], "packages": [TEXT],
    "process": Leaf("a number", lambda value: type(value) is int), "*": ANYTHING,
}  # fmt: skip
"""The form that watched_process.py gives a response."""


class Ending(NamedTuple):
    """How a watched process ended."""

    code: int
    """Exit status, or the signal's number below 0."""
    outlived: bool
    patience: float | None = None
    """Seconds after which it was ended, as it gave no answer."""


def _variables(folder: Path) -> dict[str, str]:
    """Return the variables that the process gets: those that say what the machine is, and a fresh home."""
    named = sorted(os.environ.items(), key=lambda pair: pair[0] not in LONGEST)
    variables = dict([(k, v) for k, v in named if KEPT.fullmatch(k) and len(v) <= LONGEST.get(k, 256)][:MOST])
    # in the C locale the loader reads no tables of the system's; Python itself is told to use UTF-8
    return variables | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "LC_ALL": "C"}


def run_to_end(command: list[str], folder: Path, patience: float) -> Ending:
    """Run a command to its end. It ends with this process, which is the other end of its standard input.

    Processes that go on after the answer, and an answer that does not come, are ended.
    """
    latest, answered = time.monotonic() + patience, None
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=2, env=_variables(folder), start_new_session=True
    ) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.2)
                    _end_copies(process)
                    return Ending(128 - code if code > 128 and "--kill-child" in command else code, False)
                now = time.monotonic()
                if answered is None and (folder / "response.json").exists():
                    answered = now
                if now > latest or (answered is not None and now > answered + GRACE):
                    _end(process, folder)
                    return Ending(process.wait(), answered is not None, patience if answered is None else None)
        except BaseException:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                _end(process, folder)
            raise


def _end(process: subprocess.Popen, folder: Path) -> None:
    """Kill a process with all that it started: those that strace followed go on without it, unless they are alone."""
    alone = "--kill-child" in process.args  # pyright: ignore[reportOperatorIssue] - a list of words
    followers = set() if alone else followed(folder)
    process.kill()
    _end_copies(process)
    for number in followers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _end_copies(process: subprocess.Popen) -> None:
    """Kill the copies of a process that nothing waits for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_answer(folder: Path, ending: Ending) -> dict[str, Any]:
    """Return the answer of a process, or in its place how it ended without an answer, with what it had announced."""
    response, announced = folder / "response.json", folder / "announced"
    with contextlib.suppress(OSError, ValueError):
        answer = read_json(response)
        check_value(answer, RESPONSE, "response")
        return answer
    code, names = ending.code, []
    ended = f"by signal {-code}" if code < 0 else f"with exit status {code}"
    message = f"the process ended {ended} before it answered"
    if ending.patience is not None:
        message = f"the process gave no answer for {ending.patience:g} s and was ended"
    with contextlib.suppress(OSError, ValueError):
        names = read_file(announced, MAX_TEXT).split(b"\0")[:-1]
    return {
        "value": None,
        "error": {"kind": DIED, "message": message, "traceback": ""},
        "events": {"opened": [], "network": [], "executed": []},
        "announced": [os.fsdecode(name) for name in names],
        "modules": [],
        "packages": [],
        "process": 0,
    }
