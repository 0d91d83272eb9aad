"""Who brought a file: an installed package, by its RECORD, or the system's package manager, by its lists of hashes.

A name proves nothing: a text can lie in a folder called numpy-2.0.dist-info, or under /usr. What counts as a package's
or the system's is what these lists name, with the bytes that they name.
"""

import base64
import csv
import functools
import hashlib
import importlib.metadata
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from core.files import FileError, open_file, read_text

ROOT = os.path.realpath(Path(__file__).parents[3])
"""The folder of our packages: a checkout, or site-packages."""
OURS = "skc-lab"
DEVELOPMENT = 'extra == "dev"'
EXTRA = re.compile(r";.*\bextra == ['\"]([\w.-]+)['\"]")
DEVICES = ("triton", "pytorch-triton")
"""What torch asks for on machines with a GPU only."""
DPKG = "/var/lib/dpkg/info"
MAX_LIST = 64 << 20
SMALL = 256 << 10
"""Bytes of a file of the system that no list has a hash of: what an administrator or the machine itself makes."""
SMALL_NOTE = 4096
GENERATED = re.compile(
    r"(/private)?/etc/(ld\.so\.(cache|preload|conf(\.d/.+)?)|passwd|group|hosts|host\.conf|gai\.conf|resolv\.conf|localtime"
    r"|timezone|nsswitch\.conf|os-release|machine-id|locale\.alias|mime\.types|ssl/openssl\.cnf|OpenCL/.+|libnl/.+)"
    r"|/usr/lib(64|32)?/(.+/)?gconv/gconv-modules\.cache|/usr/(share|lib)/zoneinfo/.+|/usr/share/locale/.+"
)
"""Files that the machine makes for itself."""
TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
"""CUDA's own installer leaves no hashes."""
TOOLS = ("/usr/include/", "/usr/lib/gcc/", "/Library/Developer/", "/Applications/Xcode.app/")
SEALED = (
    ("/usr/lib/", "/usr/bin/", "/usr/share/", "/usr/libexec/", "/bin/", "/sbin/") if sys.platform == "darwin" else ()
)
"""On a volume of the system that nobody can write into."""
LIBRARY = re.compile(r".+\.(so(\.\d+)*|dylib)")
MAGICS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")

Verdict = Literal["declared", "foreign", "changed", "unlisted", "none"]
"""Of a package's file: of a package that this project declares, of another one, its bytes are not those of the RECORD,
the package has no RECORD, no package has it."""


class Owned(NamedTuple):
    """A file that an installed package brought."""

    package: str
    hash: str | None
    """As RECORD has it, algorithm=base64; None for the files that RECORD has none of."""


def package_folders() -> list[str]:
    """Return the real paths of the interpreter's own folders of packages; PYTHONPATH adds none."""
    import site
    import sysconfig

    paths = sysconfig.get_paths()
    base = f"{sys.base_prefix}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    folders = [*site.getsitepackages(), paths["purelib"], paths["platlib"], base]
    return list(dict.fromkeys(map(os.path.realpath, folders)))


@functools.cache
def package_files() -> dict[str, Owned]:
    """Return real path -> owner of every file that the RECORD of an installed package lists."""
    owners = {}
    for folder, notes in _notes():
        name, record = _package(notes), notes / "RECORD"
        for row in csv.reader(_text(record).splitlines()):
            if len(row) == 3:
                owners.setdefault(os.path.normpath(os.path.join(folder, row[0])), Owned(name, row[1] or None))
    return owners


@functools.cache
def unlisted_packages() -> dict[str, str]:
    """Return top folder or file -> package, of those packages that keep no RECORD: their files cannot be told apart."""
    tops = {}
    for folder, notes in _notes():
        if not (notes / "RECORD").is_file():
            for top in (_text(notes / "top_level.txt") or _package(notes)).split():
                tops[os.path.join(folder, top)] = _package(notes)
    return tops


def _notes() -> Iterator[tuple[str, Path]]:
    """Yield (folder of packages, folder of notes) of every installed package."""
    for folder in package_folders():
        for notes in sorted((*Path(folder).glob("*.dist-info"), *Path(folder).glob("*.egg-info"))):
            yield folder, notes


def _package(notes: Path) -> str:
    """Return the name of the package whose notes these are."""
    match = re.search(r"^Name: *(.+)$", _text(notes / "METADATA") or _text(notes / "PKG-INFO"), re.MULTILINE)
    return _normal(match[1].strip() if match else notes.name.split("-")[0])


def _text(path: Path) -> str:
    """Return the text of a note, or nothing where there is none that can be read."""
    try:
        return read_text(path, MAX_LIST)
    except (OSError, FileError):
        return ""


@functools.cache
def declared_packages() -> frozenset[str]:
    """Return the packages that this project declares, with all that they ask for in turn, as they are installed."""
    try:
        asked = [words for words in importlib.metadata.requires(OURS) or [] if not words.endswith(DEVELOPMENT)]
    except importlib.metadata.PackageNotFoundError:  # a bare clone
        project = tomllib.loads(read_text(os.path.join(ROOT, "pyproject.toml"), SMALL))["project"]
        extras = project["optional-dependencies"].items()
        asked = [*project["dependencies"], *(words for extra, asked in extras if extra != "dev" for words in asked)]
    done: set[tuple[str, str]] = set()
    waiting = [*map(_requirement, asked), *((name, "") for name in DEVICES)]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        try:
            more = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # not for this platform
            continue
        for words in more:
            extra = EXTRA.search(words)
            if extra is None or extra[1] in extras.split(","):
                waiting.append(_requirement(words))
    return frozenset({OURS, *(name for name, _ in done)})


def _requirement(words: str) -> tuple[str, str]:
    """Return the name of a requirement and its extras."""
    match = re.match(r"([\w.-]+)(?:\[([\w., -]*)\])?", words)
    return (_normal(match[1]), (match[2] or "").replace(" ", "")) if match else (words, "")


def _normal(name: str) -> str:
    """Return a package's name as all its spellings are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def package_verdict(path: str) -> Verdict:
    """Return what the packages' own records say of a real path."""
    owned = package_files().get(path)
    if owned is None:
        folders = unlisted_packages()
        package = next((name for top, name in folders.items() if path == top or path.startswith(f"{top}/")), None)
        return "unlisted" if package in declared_packages() and path.endswith((".py", ".so")) else "none"
    if owned.hash is not None:
        mode, _, value = owned.hash.partition("=")
        digest = file_digest(path, mode)
        if digest is None or base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != value.rstrip("="):
            return "changed"
    elif not _may_lack_hash(path):
        return "changed"
    return "declared" if owned.package in declared_packages() or _is_small_note(path) else "foreign"


def _is_small_note(path: str) -> bool:
    """Return whether a file tells what a package offers: whoever asks for one such note reads those of all packages."""
    return os.path.basename(path) == "entry_points.txt" and os.path.getsize(path) <= SMALL_NOTE


def _may_lack_hash(path: str) -> bool:
    """Return whether RECORD has no hash of such a file: RECORD itself. Compiled bytecode has none either, and is never
    read by an audited process."""
    return os.path.basename(path) == "RECORD" and os.path.dirname(path).endswith(".dist-info")


def is_systems(path: str) -> bool:
    """Return whether a real path is a file that the system's package manager or the machine itself brought."""
    hashes = system_hashes()
    known = next((hashes[name] for name in (path, path.removeprefix("/usr")) if name in hashes), None)
    if known:
        digest = file_digest(path, "md5")
        return digest is None or digest.hex() == known
    if known is not None or GENERATED.fullmatch(path):  # a file of settings, or one that the machine made
        return not os.path.isfile(path) or os.path.getsize(path) <= SMALL
    if path.startswith(SEALED) or (path.startswith(TOOLKITS) and path.endswith((".h", ".hpp", ".cuh"))):
        return True
    if not hashes and path.startswith(TOOLS):  # no lists here
        return True
    return is_library(path) or ((not hashes or path.startswith(TOOLKITS)) and is_binary(path))


def is_library(path: str) -> bool:
    """Return whether a file is a shared library by name and content: drivers are brought by no package."""
    return LIBRARY.fullmatch(path) is not None and is_binary(path)


def is_binary(path: str) -> bool:
    """Return whether a file holds what the system's loader starts; True if it is gone."""
    try:
        with open_file(path) as file:
            return file.read(4) in MAGICS
    except (OSError, FileError):
        return True


@functools.cache
def system_hashes() -> dict[str, str]:
    """Return path -> MD5 ("" for a file of settings) of all that dpkg installed; nothing where there is no dpkg."""
    hashes: dict[str, str] = {}
    for path, lines in _dpkg():
        if path.endswith(".md5sums"):
            pairs = (line.partition("  ") for line in lines)
            hashes.update({f"/{name}": value for value, _, name in pairs})
        else:
            hashes.update({name: "" for name in lines})
    return hashes


def _dpkg() -> Iterator[tuple[str, list[str]]]:
    """Yield (name, lines) of dpkg's lists: of settings first, as a hash says more."""
    names = sorted(os.listdir(DPKG)) if os.path.isdir(DPKG) else []
    for ending in (".conffiles", ".md5sums"):
        for name in names:
            if name.endswith(ending):
                yield name, read_text(os.path.join(DPKG, name), MAX_LIST).splitlines()


def file_digest(path: str, algorithm: str) -> bytes | None:
    """Return the digest of a file, or None if it is gone; one that did not change is not read twice."""
    try:
        status = os.stat(path)
        return _digest(path, algorithm, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except (OSError, FileError):
        return None


@functools.cache
def _digest(path: str, algorithm: str, identity: tuple[int, ...]) -> bytes:
    with open_file(path) as file:
        return hashlib.file_digest(file, algorithm).digest()  # pyright: ignore[reportArgumentType] - a buffered reader
