"""Runs a function in a watched process, and returns with its answer what the process opened, reached and started.

The process (watched_process.py) notes what Python does. Libraries can open files natively, so on Linux the system's own
record stands beside these notes (strace.py), and every result says what was in force. Code that means to deceive can
change the notes from inside the process; it cannot reach what strace saw.
"""

import atexit
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.watch.answer import DIED, KEPT, PATIENCE, read_answer, run_to_end
from core.audit.watch.file_kinds import File, files_under, from_hook, listed, under
from core.audit.watch.owners import ROOT, package_folders, system_hashes, unlisted_packages
from core.audit.watch.strace import STRACE, Measures, Trace, measures, read_trace
from core.files import replace_file

HOOK = "an audit hook from before the first import"
SERVICES = tuple(f"{run}/{name}" for run in ("/run", "/var/run") for name in ("uuidd", "nscd", "nvidia-persistenced"))
"""Local sockets that libc and the GPU's driver ask by themselves."""


class Isolated(NamedTuple):
    """A process that has ended: what its function returned, and what it opened, reached and started."""

    value: Any
    error: dict[str, str] | None
    """kind, message and traceback of what the function raised; the kind is DIED if the process gave no answer."""
    seconds: float
    """From just before the process was started to its end."""
    files: list[File]
    network: list[str]
    """What was attempted, in words."""
    executed: list[str]
    """Programs that were started, with their arguments."""
    packages: dict[str, str]
    """Distribution -> version of all that was imported."""
    measures: list[str]
    """What was in force, in words."""
    missing: list[str]
    """What was not, and why."""
    returncode: int
    reached: Sequence[str] = ()
    """Attempts on the memory or the open files of other processes."""
    outlived: bool = False
    """Processes went on after the answer, and were ended."""
    tampered: Sequence[str] = ()
    """What the process changed that later ones take for granted, and what it found of earlier ones, in words."""


def run_isolated(
    function: str,
    arguments: dict[str, Any],
    *,
    hidden: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    paths: Sequence[str] | None = None,
    warm: Sequence[str] = (),
    patience: float = PATIENCE,
) -> Isolated:
    """Call `function` ("module:name") with JSON `arguments` in a fresh process, watched from before its first import.

    Where the system allows it, `hidden` files are empty for the process, there is no network and no other process.
    Files that it makes under `writable` are its own; those that lie there already are not, unless they are named. Its
    home, caches and temporary files are fresh and deleted afterwards; few environment variables reach it, and no code
    that they name. `paths`: where else to import from; None: where this process does. `warm`: modules that are compiled
    beforehand, once for all such processes. What it prints goes to standard error. What the function raises is
    returned, and so is that the process died, or gave no answer for `patience` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="skc-audit-") as name:
        folder = Path(os.path.realpath(name))
        request = _write_request(folder, function, arguments, _importable() if paths is None else paths)
        before = {file for place in writable for file in files_under(place)} - set(map(os.path.realpath, writable))
        guard, compiled = measures(folder, hidden), compiled_folder(*warm)
        stamps = _stamps(compiled)
        start = time.perf_counter()
        ending = run_to_end([*guard.prefix, *_python(compiled, request)], folder, patience)
        seconds = time.perf_counter() - start
        tampered = _stamps(compiled) != stamps
        if tampered:
            compiled_folder.cache_clear()
        answer, trace = read_answer(folder, ending), read_trace(folder)
        events, (force, missing) = answer["events"], _in_force(guard, answer, trace)
        network = [*events["network"], *(trace.network if trace else [])]
        files = listed(
            [from_hook(*event) for event in events["opened"] if trace is None or _happened(*event)],
            trace.opened if trace else [],
            set(answer["announced"]),
            answer["modules"],
            [str(folder), *map(os.path.realpath, writable)],
            before,
            trace.processes if trace else {answer["process"]},
            compiled,
        )
        return Isolated(
            value=answer["value"],
            error=answer["error"],
            seconds=seconds,
            files=files,
            network=[words for words in dict.fromkeys(network) if not _is_local(words, [str(folder)])],
            executed=list(dict.fromkeys(trace.executed if trace else events["executed"])),
            reached=tuple(dict.fromkeys(trace.reached if trace else ())),
            outlived=ending.outlived,
            tampered=(
                *(["the compiled modules that later processes read were changed"] if tampered else []),
                *(f"a call that no evaluation needs: {call}" for call in dict.fromkeys(trace.kernel if trace else [])),
            ),
            packages=_versions(answer["packages"]),
            measures=force,
            missing=[*missing, *_unproved(files)],
            returncode=ending.code,
        )


def _write_request(folder: Path, function: str, arguments: dict[str, Any], paths: Sequence[str]) -> str:
    """Make the folders of a process and the file that tells it what to do, and return that file's path."""
    for part in ("home", "tmp"):
        (folder / part).mkdir()
    request = {
        "function": function, "arguments": arguments, "response": str(folder / "response.json"),
        "announced": str(folder / "announced"), "paths": [*paths],
    }  # fmt: skip
    replace_file(folder / "request.json", json.dumps(request).encode())
    return str(folder / "request.json")


def _in_force(guard: Measures, answer: dict[str, Any], trace: Trace | None) -> tuple[list[str], list[str]]:
    """Return in words what was in force and what was not, by what hook and strace have left."""
    force, missing = [HOOK, *guard.measures], [*guard.missing]
    if trace is None and STRACE in force:
        force.remove(STRACE)
        missing.append(f"{STRACE} (it left no trace)")
    if trace is None and answer["events"]["executed"]:
        missing.append("what the processes did that it started")
    if answer["error"] and answer["error"]["kind"] == DIED:
        force.remove(HOOK)
        missing.append(f"{HOOK} (its notes ended with the process)")
    return force, missing


def _python(compiled: str, request: str) -> list[str]:
    """Return the command of the watched process: Python without variables, the user's folder, or compiled modules."""
    program = str(Path(__file__).resolve().with_name("watched_process.py"))
    return [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-X", f"pycache_prefix={compiled}", program, request]


@functools.cache
def compiled_folder(*modules: str) -> str:
    """Compile `modules` and their imports into a fresh folder and return it; it is deleted when this process ends.

    A compiled module beside its source may hold anything, so those are not read; torch alone takes seconds to compile.
    The watched processes read this folder and write nothing there: else a process could leave a note for the next.
    """
    folder = os.path.realpath(tempfile.mkdtemp(prefix="skc-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if modules:
        words = f"import sys; sys.path.insert(0, {ROOT!r}); import {', '.join(modules)}"
        command = [sys.executable, "-I", "-X", "utf8", "-X", f"pycache_prefix={folder}", "-c", words]
        environment = {k: v for k, v in os.environ.items() if KEPT.fullmatch(k)}
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, env=environment, check=False)
    return folder


def _stamps(folder: str) -> dict[str, tuple[int, ...]]:
    """Return path -> what changes when a file is written to, for all files in a folder."""
    files = {path: os.stat(path) for path in files_under(Path(folder))}
    return {path: (f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for path, f in files.items()}


def _importable() -> list[str]:
    """Return the folders that this process imports from, less the interpreter's own."""
    known = {os.path.realpath(path) for path in (*package_folders(), *sysconfig.get_paths().values())}
    real = (os.path.realpath(path) for path in sys.path if os.path.isdir(path or "."))
    return [path for path in dict.fromkeys(real) if not under(path, known)]


def _unproved(files: Sequence[File]) -> list[str]:
    """Return what the hashes of packages and of the system could not be compared with."""
    silent = sorted({name for top, name in unlisted_packages().items() if any(under(f.path, [top]) for f in files)})
    words = [f"hashes of packages that keep no RECORD: {', '.join(silent)}"] if silent else []
    return words if system_hashes() else [*words, "hashes of the system's files (no lists of dpkg here)"]


def _happened(path: str, flags: int, there: bool) -> bool:
    """Return whether the opening that the hook noted found or made a file, as far as the hook could know."""
    return there or bool(flags & os.O_CREAT)


def _is_local(words: str, own: Sequence[str]) -> bool:
    """Return whether an attempted connection is to a service of the system or a socket of the run's own."""
    _, unix, path = words.partition(" unix ")
    return bool(unix) and under(os.path.realpath(path), [*own, *SERVICES, *map(os.path.realpath, SERVICES)])


def _versions(modules: list[str]) -> dict[str, str]:
    """Return distribution -> version of top-level modules."""
    owners = _owners()
    names = sorted({name for module in modules for name in owners.get(module, [])}, key=str.lower)
    return {name: importlib.metadata.version(name) for name in names}


@functools.cache
def _owners() -> dict[str, list[str]]:
    """Return top-level module -> distributions; cached, as it reads the lists of files of all that is installed."""
    return {**importlib.metadata.packages_distributions()}
