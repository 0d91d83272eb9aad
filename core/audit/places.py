"""What kind of file lies where, and the files of a process from the notes that were taken of its openings."""

import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from core.audit.traced import Opening

Kind = Literal["code", "python", "package", "system", "input", "audit", "other"]
Seer = Literal["hook", "system"]
ROOT = os.path.realpath(Path(__file__).parent.parent.parent)
"""The folder of our packages: a checkout, or site-packages."""
CODE = tuple(os.path.join(ROOT, name) for name in ("core", "backends", "shared_tests"))
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev", "/nix/store",
          "/System", "/Library", "/private/etc", "/private/var/db")  # fmt: skip
_PATHS = sysconfig.get_paths()
_LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
_PACKAGES = {os.path.realpath(path) for path in (
    *site.getsitepackages(), _PATHS["purelib"], _PATHS["platlib"], f"{sys.base_prefix}/{_LIBRARY}/site-packages",
    *(path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")),
)}  # fmt: skip
_STANDARD = {os.path.realpath(_PATHS[name]) for name in ("stdlib", "platstdlib")}
_STANDARD |= {os.path.realpath(f"{sys.base_prefix}/{_LIBRARY}")}
_PYTHON = {
    os.path.realpath(os.path.join(prefix, part))
    for prefix in (sys.prefix, sys.base_prefix)
    for part in ("lib", "lib64", "include", "pyvenv.cfg", "bin", "Python", "Resources")
}


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


def classify(path: str, announced: Collection[str] = (), own: Sequence[str] = ()) -> Kind:
    """Return the kind of a real path, from `announced` inputs and folders that are the audit's or the run's `own`."""
    if path in announced:
        return "input"
    if under(path, own):
        return "audit"
    if path.endswith((".py", ".pyc")) and under(path, CODE):
        return "code"
    if under(path, _PACKAGES) or _is_metadata(path):
        return "package"
    if under(path, _STANDARD):
        return "python"
    if under(path, [ROOT]) and not under(path, _PYTHON):
        return "other"  # our data, even if the checkout lies under a folder of the system
    if path.startswith("/memfd:") or (under(path, SYSTEM) and not under(path, ["/dev/shm"])):
        return "system"
    return "python" if under(path, _PYTHON) else "other"


def _is_metadata(path: str) -> bool:
    """Return whether a file says what a distribution is: an editable install keeps it beside the checkout."""
    return os.path.dirname(path).endswith((".egg-info", ".dist-info"))


def listed(
    hook: Iterable[Opening],
    system: Iterable[Opening],
    announced: Collection[str],
    modules: Collection[str],
    own: Sequence[str],
    before: Collection[str],
) -> list[File]:
    """Merge what both saw into files; `modules` are the files of all modules that were imported.

    A file that the run made before it read it is its own wherever it lies; one of `before`, which lay in one of the
    `own` folders at the start, is not.
    """
    code = {os.path.realpath(path) for path in modules if path.endswith((".py", ".so"))}
    found: dict[str, dict[Seer, list[Opening]]] = {}
    seers: dict[Seer, Iterable[Opening]] = {"hook": hook, "system": system}
    for seer, openings in seers.items():
        for opening in openings:
            if not os.path.isdir(opening.path):
                found.setdefault(_source(opening.path, code), {}).setdefault(seer, []).append(opening)
    files = []
    for path, by in found.items():
        kind = classify(path, announced, [] if path in before else own)
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


def _source(path: str, code: Collection[str]) -> str:
    """Return the source of cached bytecode of our packages and of `code`, any other path as it is."""
    if path.endswith(".pyc") and "/__pycache__/" in path:
        source = importlib.util.source_from_cache(path)
        if source in code or (under(source, CODE) and os.path.isfile(source)):
            return source
    return path
