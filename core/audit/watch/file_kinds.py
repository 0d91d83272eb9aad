"""What kind of file lies where, and the files of a process from the notes that were taken of its openings."""

import os
import re
import sys
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from core.audit.watch.owners import ROOT, is_library, is_systems, package_folders, package_verdict
from core.audit.watch.strace import Opening

Kind = Literal["code", "python", "package", "system", "input", "audit", "other"]
Seer = Literal["hook", "system"]
CODE = tuple(os.path.join(ROOT, name) for name in ("core", "backends", "shared_tests"))
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/sys", "/dev", "/nix/store",
          "/System", "/Library", "/private/etc", "/private/var/db")  # fmt: skip
VIRTUAL = ("/sys", "/dev", *(("/System",) if sys.platform == "darwin" else ()))
"""Kept by the kernel, or by a system that nobody can write into."""
PROCESS = re.compile(r"/proc/(\d+)(/.*)?")
SOURCES = (".py", ".pth", ".so")
_PATHS = sysconfig.get_paths()
_LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
_PACKAGES = package_folders()
_STANDARD = {os.path.realpath(_PATHS[name]) for name in ("stdlib", "platstdlib")}
_STANDARD |= {os.path.realpath(f"{sys.base_prefix}/{_LIBRARY}")}
_PREFIXES = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}


class File(NamedTuple):
    """A file that a process opened."""

    path: str
    """Real path; for cached bytecode of ours, that of its source."""
    kind: Kind
    """code: our packages, and other modules that no package brings; input: what core.files.open_input opened; audit:
    made by the audit or by the run itself."""
    seen_by: tuple[Seer, ...]
    wrote: bool
    size: int | None
    """Bytes after the run; None if it is gone."""
    read: bool = True
    """Opened for reading."""


def under(path: str, folders: Iterable[str]) -> bool:
    """Return whether a path is one of the folders or lies in one."""
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def classify(
    path: str, announced: Collection[str] = (), own: Sequence[str] = (), processes: Collection[int] = ()
) -> Kind:
    """Return the kind of a real path.

    `announced` inputs, folders that are the audit's or the run's `own`, and the numbers of its `processes` decide
    where the path alone does not. A file of a package or of the system is one only with the bytes that its package or
    the system's own records say.
    """
    if path in announced:
        return "input"
    if under(path, own):
        return "audit"
    if path.endswith(".py") and under(path, CODE):
        return "code"
    if under(path, _PACKAGES):
        return _of_packages(path)
    if under(path, _STANDARD):
        return "python" if _is_standard(path) else "other"
    if _is_pythons(path):
        return "python"
    if under(path, [ROOT]):
        return "code" if _is_metadata(path) else "other"  # our data, even if the checkout lies under a system's folder
    if process := PROCESS.fullmatch(path):
        return "system" if int(process[1]) in processes else "other"
    if path.startswith(("/memfd:", "/proc/")) or (under(path, VIRTUAL) and not _is_stored(path)):
        return "system"
    return "system" if under(path, SYSTEM) and is_systems(path) else "other"


def _is_stored(path: str) -> bool:
    """Return whether a file under /dev is one that somebody wrote, no device."""
    return under(path, ["/dev/shm"]) or (under(path, ["/dev"]) and os.path.isfile(path))


def _of_packages(path: str) -> Kind:
    """Return the kind of a file in a folder of packages: what no RECORD knows is code of one's own, or data."""
    verdict = package_verdict(path)
    if verdict in ("declared", "unlisted"):
        return "package"
    if verdict == "foreign" or (verdict == "none" and path.endswith(SOURCES)):
        return "code"
    return "other"


def _is_standard(path: str) -> bool:
    """Return whether a file under the standard library's folder is one of its modules, by name."""
    top = next(os.path.relpath(path, folder) for folder in _STANDARD if under(path, [folder])).split("/")[0]
    name = top.split(".")[0]
    known = name in sys.stdlib_module_names or name.startswith(("_sysconfigdata", "config-")) or name == "lib-dynload"
    return known and path.endswith((".py", ".so", ".txt", "Makefile", "pyconfig.h")) and not path.endswith(".pickle")


def _is_pythons(path: str) -> bool:
    """Return whether a file is the interpreter, its library, its headers or the note of a virtual environment."""
    if not under(path, _PREFIXES):
        return False
    name = os.path.basename(path)
    if name == "pyvenv.cfg":
        return os.path.getsize(path) <= 4096
    base = os.path.realpath(sys.base_prefix)
    headers = under(path, [f"{base}/include"]) and name.endswith(".h")
    libraries = under(path, [f"{base}/lib", f"{base}/lib64", f"{base}/Python"]) and is_library(path)
    return headers or libraries or path == os.path.realpath(sys.executable)


def _is_metadata(path: str) -> bool:
    """Return whether a file says what a distribution is: an editable install keeps it beside the checkout."""
    return os.path.dirname(path) in {f"{ROOT}/skc_lab.egg-info"}


def listed(
    hook: Iterable[Opening],
    system: Iterable[Opening],
    announced: Collection[str],
    modules: Collection[str],
    own: Sequence[str],
    before: Collection[str],
    processes: Collection[int] = (),
    compiled: str = "",
) -> list[File]:
    """Merge what both saw into files; `modules` are the files of all modules that were imported.

    A file that the run made before it read it is its own wherever it lies; one of `before`, which lay in one of the
    `own` folders at the start, is not. A compiled module in the folder `compiled` stands for its source.
    """
    code = {os.path.realpath(path) for path in modules if path.endswith((".py", ".so"))}
    openings_of: dict[str, dict[Seer, list[Opening]]] = {}
    seers: dict[Seer, Iterable[Opening]] = {"hook": hook, "system": system}
    for seer, openings in seers.items():
        for opening in openings:
            if not os.path.isdir(opening.path):
                openings_of.setdefault(_source(opening.path, compiled), {}).setdefault(seer, []).append(opening)
    files = []
    for path, by in openings_of.items():
        kind = classify(path, announced, [] if path in before else own, processes)
        # strace tells the order; the hook alone knows whether a file was there that is then opened for appending
        noted, traced = (by[seer][0] if seer in by else None for seer in seers)
        if (traced and traced.made) or (noted and noted.made and (traced is None or traced.wrote)):
            kind = "audit" if kind == "other" else kind
        elif kind == "other" and path in code:
            kind = "code"
        every = [opening for openings in by.values() for opening in openings]
        wrote, read = any(opening.wrote for opening in every), any(opening.read for opening in every)
        size = os.path.getsize(path) if os.path.isfile(path) else None
        files.append(File(path, kind, tuple(by), wrote, size, read))
    return files


def from_hook(path: str, flags: int, there: bool) -> Opening:
    """Return what the hook noted: a real path, the flags of os.open, and whether the file was there before."""
    way = flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR)
    made = bool(flags & os.O_CREAT and not there) or bool(flags & os.O_TRUNC)
    return Opening(path, way != os.O_WRONLY, way != os.O_RDONLY, made)


def files_under(folder: Path) -> set[str]:
    """Return the real paths of all files in a folder, which need not be there."""
    return {os.path.realpath(os.path.join(top, name)) for top, _, names in os.walk(folder) for name in names}


def _source(path: str, compiled: str) -> str:
    """Return the source of a compiled module in the folder `compiled`, any other path as it is."""
    if compiled and path.startswith(f"{compiled}/"):
        folder, _, name = path.removeprefix(compiled).rpartition("/")
        source = f"{folder}/{name.split('.')[0]}.py"
        return source if os.path.isfile(source) else path
    return path
