"""What the system itself sees of a process and keeps from it, on Linux: strace, an empty network, covered files."""

import os
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from core.files import open_file, replace_file

OPENS = ("open", "openat", "openat2", "creat", "open_by_handle_at")
SENDS = ("connect", "bind", "sendto", "sendmsg", "sendmmsg")
STARTS = ("execve", "execveat")
KERNEL = (
    "add_key", "keyctl", "request_key", "shmget", "msgget", "semget", "mq_open", "getxattr", "lgetxattr", "fgetxattr",
    "mount", "umount2", "move_mount", "open_tree", "fsopen", "fsmount", "pivot_root", "chroot", "unshare", "setns",
    "io_uring_setup", "bpf", "userfaultfd",
)  # fmt: skip
"""Ways to words that the kernel keeps from one process to the next, to another view of the files, and past strace."""
REACHES = ("process_vm_readv", "process_vm_writev", "ptrace", "pidfd_getfd", "pidfd_open", "kcmp")
"""Ways to the memory, the open files or the kept words of another process."""
STRACE = "strace of opened files, connections and programs"
ALONE = "no other process in sight"
POWERLESS = "no powers of the administrator"
COVER = 'e=$1; shift; while [ "$1" != -- ]; do mount --bind "$e" "$1" || exit 97; shift; done; shift; exec "$@"'
"""Shell: cover files by an empty one, then become the command after `--`."""
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(.*)", re.DOTALL)
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_FOLDER = re.compile(r"(?:AT_FDCWD|\d+)<((?:[^>\\]|\\.)*)>, ")


class Opening(NamedTuple):
    """One opening of a file."""

    path: str
    """Real path; of an opening that was refused, the absolute one."""
    read: bool
    wrote: bool
    made: bool
    """It was created or emptied by this opening."""


class Trace(NamedTuple):
    """What strace saw, in order of time."""

    opened: list[Opening]
    network: list[str]
    executed: list[str]
    reached: list[str]
    """Attempts on other processes than its own."""
    kernel: list[str]
    """Calls of KERNEL, whatever came of them."""
    processes: set[int]
    """Numbers of all threads that were followed."""


class Measures(NamedTuple):
    """What is put in front of a command, what that does, and what could not be had."""

    prefix: list[str]
    measures: list[str]
    missing: list[str]


def measures(folder: Path, hidden: Sequence[Path]) -> Measures:
    """Try each measure with a trivial command; traces go to folder/trace/, one file per thread."""
    (folder / "trace").mkdir()
    replace_file(folder / "empty")
    force = Measures([], [], [])
    if sys.platform != "linux":
        force.missing.append("the system's own record of files, network and programs: strace is for Linux only")
        return force
    files = sorted({os.path.realpath(path) for path in hidden if path.is_file()})
    cover = ["sh", "-c", COVER, "sh", str(folder / "empty"), *files, "--"]
    calls = ",".join(f"?{name}" for name in (*OPENS, *SENDS, *STARTS, *REACHES, *KERNEL))
    strace = ["strace", "-ff", "-qq", "-ttt", "-y", "--seccomp-bpf", "-s", "4096", "-e", f"trace={calls}"]
    alone = ["-p", "-i", "-f", "--kill-child", "--mount-proc"]
    wanted = [
        (ALONE, [["unshare", *alone], ["unshare", "-r", *alone]]),
        ("a network without any interface", [["unshare", "-n"], ["unshare", "-rn"]]),
    ]
    if files:
        covers = [["unshare", flags, *cover] for flags in ("-m", "-rm")]
        wanted.append((f"{len(files)} training files covered by an empty file", covers))
    wanted.append((POWERLESS, [["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]]))
    wanted.append((STRACE, [[*strace, "-o", str(folder / "trace" / "thread")]]))
    for words, ways in wanted:
        reasons = []
        for way in ways:
            reason = _refusal([*force.prefix, *way, "true"])
            if reason is None:
                force.prefix.extend(way)
                force.measures.append(words)
                break
            reasons.append(reason)
        else:
            force.missing.append(f"{words} ({'; '.join(reasons)})")
    for trace in (folder / "trace").iterdir():
        trace.unlink()  # that of `true`
    return force


def _refusal(command: list[str]) -> str | None:
    """Return why a command does not work here, or None if it does."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit {done.returncode}")


def read_trace(folder: Path) -> Trace | None:
    """Read what `strace -ff -ttt -y` left in folder/trace/ (each thread has its file, so no call is cut in two).

    The first program is the audited one and is left out; None if there is not even that: then nothing was traced.
    """
    lines, processes = [], followed(folder)
    for path in (folder / "trace").iterdir():
        with open_file(path) as file:
            for line in file.read().decode("utf-8", "replace").splitlines():
                moment, _, call = line.partition(" ")
                lines.append((float(moment), call))
    trace = Trace([], [], [], [], [], processes)
    for _, line in sorted(lines):
        match = _CALL.match(line)
        if match is None:  # signals, and calls that the end of the process cut off
            continue
        name, arguments, result, note = match.groups()
        if name in OPENS:
            trace.opened.extend(_opening(name, arguments, int(result) >= 0, note))
        elif name in SENDS:
            trace.network.extend(_address(name, arguments))
        elif name in STARTS and result == "0":
            words = [_unescape(word) for word in _TEXT.findall(arguments)]
            trace.executed.append(" ".join([words[0], *words[2:]]))
        elif name in REACHES:
            trace.reached.extend(_target(name, arguments, processes))
        elif name in KERNEL:
            trace.kernel.append(f"{name}({arguments[:60]})")
    return trace._replace(executed=trace.executed[1:]) if trace.executed else None


def followed(folder: Path) -> set[int]:
    """Return the numbers of the threads that strace has followed so far, as they are in the processes' own view."""
    return {int(path.suffix[1:]) for path in (folder / "trace").iterdir() if path.suffix[1:].isdecimal()}


def _target(name: str, arguments: str, processes: Collection[int]) -> list[str]:
    """Return what a call wants of another process, in a list: none if that is one of `processes`, or itself."""
    first, *rest = arguments.split(", ")
    if name == "ptrace":
        if first in ("PTRACE_TRACEME",):
            return []
        first = rest[0] if rest else first
    number = re.search(r"\d+", first.rpartition("<")[2] if "<" in first else first)
    known = number is not None and int(number[0]) in {0, *processes}
    return [] if known else [f"{name}({first})"]


def _opening(name: str, arguments: str, done: bool, note: str) -> list[Opening]:
    """Return the opening of a file in a list: none for a folder, and for a file that is not there."""
    text, folder = _TEXT.search(arguments), _FOLDER.match(arguments)
    flags = arguments[text.end() :] if text else arguments
    refused = "EACCES" in note or "EPERM" in note
    if not (done or refused) or "O_PATH" in flags or ("O_DIRECTORY" in flags and "O_TMPFILE" not in flags):
        return []
    path = note[note.find("<") + 1 : note.rfind(">")] if done and "<" in note else None
    if path is None:
        named = os.path.join(_unescape(folder[1]) if folder else "/", _unescape(text[1]) if text else "")
        path = os.path.abspath(named) if refused else os.path.realpath(named)
    else:
        path = _unescape(path).removesuffix(" (deleted)")
    if not path.startswith("/"):  # a pipe or a socket
        return []
    creates = name == "creat"
    made = creates or "O_TRUNC" in flags or "O_TMPFILE" in flags or ("O_CREAT" in flags and "O_EXCL" in flags)
    reads = not (creates or "O_WRONLY" in flags)
    return [Opening(path, reads, creates or "O_WRONLY" in flags or "O_RDWR" in flags, made and done)]


def _address(name: str, arguments: str) -> list[str]:
    """Return where a call wants to reach, in a list: none without an address or for the kernel's own families."""
    family = re.search(r"sa_family=(\w+)", arguments)
    if family is None or family[1] in ("AF_NETLINK", "AF_UNSPEC"):
        return []
    if family[1] == "AF_UNIX":
        path = re.search(r'sun_path=(@?)"((?:[^"\\]|\\.)*)"', arguments)
        return [f"{name} unix {path[1]}{_unescape(path[2])}"] if path else []
    place = re.search(r"sa_family=\w+, ([^}]*)\}", arguments)
    return [f"{name} {family[1]} {place[1] if place else ''}".rstrip()]


def _unescape(text: str) -> str:
    """Return what strace escaped as C does."""
    return os.fsdecode(text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1", "replace"))
