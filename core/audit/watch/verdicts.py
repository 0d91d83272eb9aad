"""Judges what a watched process opened, reached and started: rules D4 and D18."""

import filecmp
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from core.audit.rules import Finding
from core.audit.watch.answer import DIED
from core.audit.watch.file_kinds import PROCESS, SYSTEM, File, classify, under
from core.audit.watch.isolation import Isolated
from core.audit.watch.owners import package_folders
from core.audit.watch.strace import STRACE

COMPILERS = re.compile(
    r"(.+-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|cc1|cc1plus|as|ld|ld\.\w+|lld|collect2|lto-wrapper|lto1"
    r"|nvcc|cicc|ptxas|nvlink|fatbinary|cudafe\+\+|xcrun|metal|metallib|ldconfig)(-[\d.]+)?"
)
"""Compilers, linkers, and what tells where libraries lie: torch and MLX start these by themselves."""


def check_isolation(process: Isolated, train_files: Sequence[Path]) -> Finding:
    """Judge rule D4: the process reached no network and no training file, and opened every input by the opener.

    A training file is known by its path, by a link to it and by its content.
    """
    train = _TrainingFiles(train_files)
    trained = [file for file in process.files if train.hold(file)]
    unknown = [file for file in process.files if file.kind == "other" and file.read and file not in trained]
    problems = [f"training data: {_named(file)}" for file in trained]
    problems += [f"{_what(file)}: {_named(file)}" for file in unknown]
    problems += [f"network: {words}" for words in process.network]
    problems += [f"another process: {words}" for words in process.reached]
    problems += process.tampered
    inputs = [file for file in process.files if file.kind == "input"]
    details = {
        "problems": problems,
        "inputs": {file.path: file.size for file in inputs},
        "written": [file.path for file in process.files if file.kind == "other" and not file.read],
        "largest": {f.path: f.size for f in sorted(process.files, key=lambda f: f.size or 0, reverse=True)[:5]},
        "in force": process.measures,
        "not in force": process.missing,
    }
    force, lacking = ("; ".join(words) or "nothing" for words in (process.measures, process.missing))
    checks = f"In force: {force}. Not in force: {lacking}."
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        return Finding("D4", "FAIL", f"{'; '.join(problems[:3])}{more}. {checks}", details)
    if process.error is not None:
        reason = f"{process.error['kind']}: {process.error['message']}"
        return Finding("D4", "NOT CHECKED", f"The evaluation did not finish ({reason}). {checks}", details)
    opened = f"{len(process.files)} files were opened, {len(inputs)} of them inputs, all through the opener"
    return Finding("D4", "PASS", f"{opened}; no training file, no network. {checks}", details)


class _TrainingFiles:
    """Training files, to be found again under any name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = {os.path.realpath(path) for path in paths}
        self._sizes: dict[int, list[str]] = {}
        for path in sorted(filter(os.path.isfile, self._paths)):
            self._sizes.setdefault(os.path.getsize(path), []).append(path)

    def hold(self, file: File) -> bool:
        """Return whether a file is a training file, a link to one or a copy of one."""
        if file.path in self._paths:
            return True
        same = self._sizes.get(file.size, []) if file.size and os.path.isfile(file.path) else []
        return any(filecmp.cmp(file.path, path, shallow=False) for path in same)


def _what(file: File) -> str:
    """Return what is wrong with a file that neither a package nor the system explains."""
    if PROCESS.fullmatch(file.path):
        return "another process"
    if under(file.path, package_folders()):
        return "no package has it, or with other bytes"
    return "not through the opener, and not the system's" if under(file.path, SYSTEM) else "not through the opener"


def _named(file: File) -> str:
    return f"{file.path} (seen by the {' and the '.join(file.seen_by)})"


def notes_left(process: Isolated, before: Isolated, start: int, folder: str) -> list[str]:
    """Return, in words, the files that a process read and that the process `before` it may have left for it.

    These lie outside of its own `folder`, and were written since `start` (time.time_ns()) or were of no use to the
    process before.
    """
    known, words = {file.path for file in before.files if file.read}, []
    for file in process.files:
        if file.kind not in ("input", "other", "code") or not file.read or under(file.path, [folder]):
            continue
        try:
            fresh = os.stat(file.path).st_ctime_ns > start
        except OSError:
            fresh = True
        if fresh or (file.kind != "code" and file.path not in known):
            words.append(f"a file that the evaluation may have left for this process: {_named(file)}")
    return words


def check_packages(process: Isolated) -> Finding:
    """Judge rule D18: the process started no program but Python itself and the system's compilers."""
    declared = [words for words in process.executed if _is_declared(words)]
    foreign = [words for words in process.executed if words not in declared]
    details = {"packages": process.packages, "executed": process.executed, "foreign": foreign}
    if foreign:
        names = "; ".join(words[:200] for words in foreign[:3])
        return Finding("D18", "FAIL", f"{len(foreign)} foreign programs were executed: {names}", details)
    if process.error is not None and process.error["kind"] == DIED:
        return Finding("D18", "NOT CHECKED", f"{process.error['message']}: its packages are unknown", details)
    packages = ", ".join(f"{name} {version}" for name, version in process.packages.items())
    programs = ", ".join(sorted({os.path.basename(words.split()[0]) for words in declared})) or "none"
    source = "strace" if STRACE in process.measures else f"the audit hook alone, without {STRACE}"
    evidence = f"imported: {packages or 'no package'}; executed: {programs} (by {source})"
    evidence += "; processes that went on after the answer were ended" if process.outlived else ""
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
