"""An evaluation in a process of its own, and what that opened, reached and started: rules D4 and D18.

The process (witness.py) notes what Python does. Libraries can open files natively, so on Linux the system's own record
stands beside it (traced.py), and every result says what was in force. Code that means to deceive could change
witness.py's notes from inside; what strace saw is out of its reach.
"""

import filecmp
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.places import File as File
from core.audit.places import classify, files_under, from_hook, listed, under
from core.audit.rules import Finding
from core.audit.traced import STRACE, measures, read_trace

HOOK = "an audit hook from before the first import"
DIED = "died"
"""Kind of the error of a process that ended without an answer."""
SERVICES = ("/run/nscd", "/var/run/nscd", "/run/nvidia-persistenced", "/var/run/nvidia-persistenced")
"""Local sockets that libc and the GPU's driver ask by themselves."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
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


def run_isolated(
    function: str,
    arguments: dict[str, Any],
    *,
    hidden: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    environment: dict[str, str] | None = None,
) -> Isolated:
    """Call `function` ("module:name") with JSON `arguments` in a fresh process, watched from before its first import.

    Where the system allows it, `hidden` files are empty for the process and there is no network. Files that it makes
    under `writable` are its own; those that lie there already are not, unless they are named. Its home, caches and
    temporary files are fresh and deleted afterwards; `environment` adds variables. What it prints goes to standard
    error. What the function raises is returned, and so is that the process died.
    """
    with tempfile.TemporaryDirectory(prefix="skc-audit-") as name:
        folder = Path(os.path.realpath(name))
        for part in ("home", "tmp"):
            (folder / part).mkdir()
        request, response = folder / "request.json", folder / "response.json"
        request.write_text(json.dumps({"function": function, "arguments": arguments, "response": str(response)}))
        before = {file for place in writable for file in files_under(place)} - set(map(os.path.realpath, writable))
        guard = measures(folder, hidden)
        witness = [sys.executable, "-S", "-s", str(Path(__file__).resolve().with_name("witness.py")), str(request)]
        start = time.perf_counter()
        code = _wait([*guard.prefix, *witness], _variables(folder) | (environment or {}))
        seconds = time.perf_counter() - start
        answer = _answer(response, code)
        events, seen = answer["events"], read_trace(folder)
        opened = [e for e in events["opened"] if seen is None or _happened(*e)]
        force, missing = [HOOK, *guard.measures], guard.missing
        if seen is not None:
            missing = missing + seen.blind
        elif STRACE in force:
            force.remove(STRACE)
            missing = [*missing, f"{STRACE} (it left no trace)"]
        if seen is None and events["executed"]:
            missing = [*missing, "what the processes did that it started"]
        if answer["error"] and answer["error"]["kind"] == DIED:
            force.remove(HOOK)
            missing = [*missing, f"{HOOK} (its notes ended with the process)"]
        own = [str(folder), *(os.path.realpath(path) for path in writable)]
        network = [*events["network"], *(seen.network if seen else [])]
        return Isolated(
            value=answer["value"],
            error=answer["error"],
            seconds=seconds,
            files=listed(
                [from_hook(*event) for event in opened],
                seen.opened if seen else [],
                set(answer["announced"]),
                answer["modules"],
                own,
                before,
            ),
            network=[words for words in dict.fromkeys(network) if not _is_local(words, own)],
            executed=list(dict.fromkeys(seen.executed if seen else events["executed"])),
            packages=_versions(answer["packages"]),
            measures=force,
            missing=missing,
            returncode=code,
        )


def _happened(path: str, flags: int, there: bool) -> bool:
    """Return whether the opening that the hook noted found or made a file, as far as the hook could know."""
    return there or bool(flags & os.O_CREAT)


def _variables(folder: Path) -> dict[str, str]:
    """Return our environment variables with a fresh home and, of Python's own, the path only."""
    kept = {k: v for k, v in os.environ.items() if k == "PYTHONPATH" or not k.startswith("PYTHON")}
    fresh = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    return {k: v for k, v in kept.items() if k not in CACHES} | fresh


def _wait(command: list[str], variables: dict[str, str]) -> int:
    """Run a command to its end and return its exit status; its standard input ends when we do, and so does it."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, env=variables) as process:
        try:
            return process.wait()
        except BaseException:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _answer(response: Path, code: int) -> dict[str, Any]:
    """Return the response, or one that says how the process ended without any."""
    try:
        return json.loads(response.read_text("utf-8"))
    except (OSError, ValueError):
        ended = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        error = {"kind": DIED, "message": f"the process ended {ended} before it answered", "traceback": ""}
        nothing = {"opened": [], "network": [], "executed": []}
        return {"value": None, "error": error, "events": nothing, "announced": [], "modules": [], "packages": []}


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
    problems += [f"not through the opener: {_seen(file)}" for file in unknown]
    problems += [f"network: {words}" for words in found.network]
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


def _seen(file: File) -> str:
    return f"{file.path} (seen by the {' and the '.join(file.seen_by)})"


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
