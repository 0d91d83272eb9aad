"""An evaluation in a process of its own, and what that opened, reached and started: rules D4 and D18.

The process (witness.py) notes what Python does. Libraries can open files natively, so on Linux the system's own record
stands beside it (traced.py), and every result says what was in force. Code that means to deceive could change
witness.py's notes from inside; what strace saw is out of its reach.
"""

import atexit
import contextlib
import filecmp
import functools
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.rules import Finding
from core.audit.watch.owners import ROOT, package_folders, system_hashes, unlisted_packages
from core.audit.watch.places import PROCESS, SYSTEM, classify, files_under, from_hook, listed, under
from core.audit.watch.places import File as File
from core.audit.watch.traced import STRACE, followed, measures, read_trace
from core.files import MAX_TEXT, read_file, read_json, replace_file

HOOK = "an audit hook from before the first import"
DIED = "died"
"""Kind of the error of a process that ended without an answer."""
SERVICES = (
    "/run/uuidd",
    "/var/run/uuidd",
    "/run/nscd",
    "/var/run/nscd",
    "/run/nvidia-persistenced",
    "/var/run/nvidia-persistenced",
)
"""Local sockets that libc and the GPU's driver ask by themselves."""
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
COMPILERS = re.compile(
    r"(.+-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|cc1|cc1plus|as|ld|ld\.\w+|lld|collect2|lto-wrapper|lto1"
    r"|nvcc|cicc|ptxas|nvlink|fatbinary|cudafe\+\+|xcrun|metal|metallib|ldconfig)(-[\d.]+)?"
)
"""Compilers, linkers, and what tells where libraries lie: torch and MLX start these by themselves."""


class Isolated(NamedTuple):
    """What a function returned in a process of its own, and what the process did."""

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
        for part in ("home", "tmp"):
            (folder / part).mkdir()
        request = {
            "function": function, "arguments": arguments, "response": str(folder / "response.json"),
            "announced": str(folder / "announced"), "paths": _importable() if paths is None else [*paths],
        }  # fmt: skip
        replace_file(folder / "request.json", json.dumps(request).encode())
        before = {file for place in writable for file in files_under(place)} - set(map(os.path.realpath, writable))
        guard, compiled = measures(folder, hidden), compiled_folder(*warm)
        kept = _stamps(compiled)
        start = time.perf_counter()
        ending = _wait([*guard.prefix, *_python(compiled, str(folder / "request.json"))], folder, patience)
        seconds = time.perf_counter() - start
        answer = _answer(folder, ending)
        events, seen = answer["events"], read_trace(folder)
        opened = [e for e in events["opened"] if seen is None or _happened(*e)]
        force, missing = [HOOK, *guard.measures], guard.missing
        if seen is None and STRACE in force:
            force.remove(STRACE)
            missing = [*missing, f"{STRACE} (it left no trace)"]
        if seen is None and events["executed"]:
            missing = [*missing, "what the processes did that it started"]
        if answer["error"] and answer["error"]["kind"] == DIED:
            force.remove(HOOK)
            missing = [*missing, f"{HOOK} (its notes ended with the process)"]
        own = [str(folder), *(os.path.realpath(path) for path in writable)]
        network = [*events["network"], *(seen.network if seen else [])]
        files = listed(
            [from_hook(*event) for event in opened],
            seen.opened if seen else [],
            set(answer["announced"]),
            answer["modules"],
            own,
            before,
            seen.processes if seen else {answer["process"]},
            compiled,
        )
        tampered = _stamps(compiled) != kept
        if tampered:
            compiled_folder.cache_clear()
        return Isolated(
            value=answer["value"],
            error=answer["error"],
            seconds=seconds,
            files=files,
            network=[words for words in dict.fromkeys(network) if not _is_local(words, [str(folder)])],
            executed=list(dict.fromkeys(seen.executed if seen else events["executed"])),
            reached=tuple(dict.fromkeys(seen.reached)) if seen else (),
            outlived=ending.outlived,
            tampered=(
                *(["the compiled modules that later processes read were changed"] if tampered else []),
                *(f"a call that no evaluation needs: {call}" for call in dict.fromkeys(seen.kernel if seen else [])),
            ),
            packages=_versions(answer["packages"]),
            measures=force,
            missing=[*missing, *_unproved(files)],
            returncode=ending.code,
        )


def _python(compiled: str, request: str) -> list[str]:
    """Return the command of the witness: no variable, no folder of the user's and no compiled module of others."""
    witness = str(Path(__file__).resolve().with_name("witness.py"))
    return [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-X", f"pycache_prefix={compiled}", witness, request]


@functools.cache
def compiled_folder(*modules: str) -> str:
    """Return a fresh folder with what `modules` and all that they import are compiled to; it goes with this process.

    A compiled module beside its source may hold anything, so those are not read; torch alone takes seconds to compile.
    The watched processes read this folder and write nothing there: else one could leave a note for the next.
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
    """Return what says that a file was written to, for all in a folder."""
    found = {path: os.stat(path) for path in files_under(Path(folder))}
    return {path: (one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for path, one in found.items()}


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


class _Ending(NamedTuple):
    """How a process ended."""

    code: int
    """Exit status, or the signal's number below 0."""
    outlived: bool
    patience: float | None = None
    """Seconds after which it was ended, as it gave no answer."""


def _happened(path: str, flags: int, there: bool) -> bool:
    """Return whether the opening that the hook noted found or made a file, as far as the hook could know."""
    return there or bool(flags & os.O_CREAT)


def _variables(folder: Path) -> dict[str, str]:
    """Return the process's environment: what says what the machine is, and a fresh home."""
    named = sorted(os.environ.items(), key=lambda pair: pair[0] not in LONGEST)
    kept = dict([(k, v) for k, v in named if KEPT.fullmatch(k) and len(v) <= LONGEST.get(k, 256)][:MOST])
    # in the C locale the loader reads no tables of the system's; Python itself is told to use UTF-8
    return kept | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "LC_ALL": "C"}


def _wait(command: list[str], folder: Path, patience: float) -> _Ending:
    """Run a command to its end; its standard input ends when we do, and so does it.

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
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)  # copies that nothing waits for
                    return _Ending(128 - code if code > 128 and "--kill-child" in command else code, False)
                now = time.monotonic()
                if answered is None and (folder / "response.json").exists():
                    answered = now
                if now > latest or (answered is not None and now > answered + GRACE):
                    _end(process, folder)
                    return _Ending(process.wait(), answered is not None, patience if answered is None else None)
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
    for number in followers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _answer(folder: Path, ending: _Ending) -> dict[str, Any]:
    """Return the response, or one that says how the process ended without any, with what it had announced."""
    response, announced = folder / "response.json", folder / "announced"
    with contextlib.suppress(OSError, ValueError):
        answer = read_json(response)
        if _is_answer(answer):
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


def _is_answer(answer: Any) -> bool:
    """Return whether a response has the form that the witness gives it."""
    lists = ("announced", "modules", "packages")
    good = isinstance(answer, dict) and answer.keys() >= {"value", "error", "events", "process", *lists}
    if not good or type(answer["process"]) is not int or not all(_is_texts(answer[name]) for name in lists):
        return False
    events, error = answer["events"], answer["error"]
    if error is not None and not (isinstance(error, dict) and {"kind", "message", "traceback"} <= error.keys()):
        return False
    named = isinstance(events, dict) and all(_is_texts(events.get(name)) for name in ("network", "executed"))
    return named and all(
        isinstance(one, list) and [type(part) for part in one] == [str, int, bool] for one in events.get("opened", [0])
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


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


def check_isolation(found: Isolated, train_files: Sequence[Path]) -> Finding:
    """Judge D4: no network, no training file (by path, link or content), and every input through the opener."""
    train = _Files(train_files)
    trained = [file for file in found.files if train.hold(file)]
    unknown = [file for file in found.files if file.kind == "other" and file.read and file not in trained]
    problems = [f"training data: {_seen(file)}" for file in trained]
    problems += [f"{_what(file)}: {_seen(file)}" for file in unknown]
    problems += [f"network: {words}" for words in found.network]
    problems += [f"another process: {words}" for words in found.reached]
    problems += found.tampered
    inputs = [file for file in found.files if file.kind == "input"]
    details = {
        "problems": problems,
        "inputs": {file.path: file.size for file in inputs},
        "written": [file.path for file in found.files if file.kind == "other" and not file.read],
        "largest": {f.path: f.size for f in sorted(found.files, key=lambda f: f.size or 0, reverse=True)[:5]},
        "in force": found.measures,
        "not in force": found.missing,
    }
    force, lacking = ("; ".join(words) or "nothing" for words in (found.measures, found.missing))
    checks = f"In force: {force}. Not in force: {lacking}."
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        return Finding("D4", "FAIL", f"{'; '.join(problems[:3])}{more}. {checks}", details)
    if found.error is not None:
        reason = f"{found.error['kind']}: {found.error['message']}"
        return Finding("D4", "NOT CHECKED", f"The evaluation did not finish ({reason}). {checks}", details)
    opened = f"{len(found.files)} files were opened, {len(inputs)} of them inputs, all through the opener"
    return Finding("D4", "PASS", f"{opened}; no training file, no network. {checks}", details)


class _Files:
    """Training files, to be found again under any name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = {os.path.realpath(path) for path in paths}
        self._sizes: dict[int, list[str]] = {}
        for path in sorted(filter(os.path.isfile, self._paths)):
            self._sizes.setdefault(os.path.getsize(path), []).append(path)

    def hold(self, file: File) -> bool:
        """Return whether a file is one of them, a link to one or a copy of one."""
        if file.path in self._paths:
            return True
        same = self._sizes.get(file.size, []) if file.size and os.path.isfile(file.path) else []
        return any(filecmp.cmp(file.path, path, shallow=False) for path in same)


def _what(file: File) -> str:
    """Return what is wrong with a file that nothing explains."""
    if PROCESS.fullmatch(file.path):
        return "another process"
    if under(file.path, package_folders()):
        return "no package has it, or with other bytes"
    return "not through the opener, and not the system's" if under(file.path, SYSTEM) else "not through the opener"


def _seen(file: File) -> str:
    return f"{file.path} (seen by the {' and the '.join(file.seen_by)})"


def notes_left(found: Isolated, before: Isolated, start: int, folder: str) -> list[str]:
    """Return what a process read that one before it may have left for it, in words.

    That is whatever lies outside of its own `folder` and was written since `start` (time.time_ns()), or was of no use
    to the process before.
    """
    known, words = {file.path for file in before.files if file.read}, []
    for file in found.files:
        if file.kind not in ("input", "other", "code") or not file.read or under(file.path, [folder]):
            continue
        try:
            fresh = os.stat(file.path).st_ctime_ns > start
        except OSError:
            fresh = True
        if fresh or (file.kind != "code" and file.path not in known):
            words.append(f"a file that the evaluation may have left for this process: {_seen(file)}")
    return words


def check_packages(found: Isolated) -> Finding:
    """Judge D18: what was imported, and that nothing was executed but Python itself and compilers of the system."""
    declared = [words for words in found.executed if _is_declared(words)]
    foreign = [words for words in found.executed if words not in declared]
    details = {"packages": found.packages, "executed": found.executed, "foreign": foreign}
    if foreign:
        names = "; ".join(words[:200] for words in foreign[:3])
        return Finding("D18", "FAIL", f"{len(foreign)} foreign programs were executed: {names}", details)
    if found.error is not None and found.error["kind"] == DIED:
        return Finding("D18", "NOT CHECKED", f"{found.error['message']}: its packages are unknown", details)
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    programs = ", ".join(sorted({os.path.basename(words.split()[0]) for words in declared})) or "none"
    source = "strace" if STRACE in found.measures else f"the audit hook alone, without {STRACE}"
    evidence = f"imported: {packages or 'no package'}; executed: {programs} (by {source})"
    evidence += "; processes that went on after the answer were ended" if found.outlived else ""
    return Finding("D18", "PASS", evidence, details)


def _is_declared(words: str) -> bool:
    """Return whether a command is our own Python, or a compiler from where the system or a package keeps programs."""
    program, *arguments = words.split()
    if program.startswith("("):  # a copy of the process, not a program
        return True
    path = os.path.realpath(shutil.which(program) or program)
    if path == os.path.realpath(sys.executable):
        return True
    if classify(path) not in ("system", "python", "package"):
        return False
    name = os.path.basename(program)
    if name in ("sh", "bash", "dash") and arguments[:1] == ["-c"] and len(arguments) > 1:
        name = os.path.basename(arguments[1])  # what else the shell starts has an entry of its own
    if name == "openssl":  # torch's compiler takes the hash of its headers so
        return arguments[:1] == ["sha512"]
    return COMPILERS.fullmatch(name) is not None
