"""What may lie in the place of a file, how it gets there, and what a command may do then: shared by hostile tests.

`Server` is a process that runs command lines in forks of itself: imports are paid for once, and processor time, memory
and hangs of each command are measured. `plant` puts one of KINDS under a name, `judge` says what a command broke.

    server = Server()
    case = plant(kind, folder / "metrics.jsonl", strangers)
    judge(server.run(["compare", str(folder), str(other)]), strangers)
"""

import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core import rng

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0
"""Of processor time that a command may take, whatever lies there."""
MEGABYTES = 512
"""That may be resident in it."""
LINE = 400
"""Characters of its message."""
WAIT = 300
"""Seconds after which a command counts as hanging: on a machine that others use too."""
GIGABYTE = 1 << 30


def _bytes(make: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    """Return how a file gets other bytes, made of those that it had."""

    def put(path: Path, strangers: Path) -> None:
        before = path.read_bytes() if path.is_file() else b""
        path.unlink(missing_ok=True)
        path.write_bytes(make(before))

    return put


def _link(target: str) -> Callable[[Path, Path], None]:
    """Return how a name becomes a link; `target` may name the file in the folder of strangers."""

    def put(path: Path, strangers: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target.format(path=path, strangers=strangers))

    return put


def _stranger(path: Path, strangers: Path) -> None:
    """A link to a file elsewhere that holds what was here: it may be read, and must stay as it is."""
    there = strangers / path.name
    there.write_bytes(path.read_bytes() if path.is_file() else b"mine")
    path.unlink(missing_ok=True)
    path.symlink_to(there)


def _fifo(path: Path, strangers: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _socket(path: Path, strangers: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _folder(path: Path, strangers: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def _sparse(path: Path, strangers: Path) -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(GIGABYTE)


def _tail(path: Path, strangers: Path) -> None:
    """What was there, and a gigabyte of zeros after it."""
    with open(path, "ab") as file:
        file.truncate(GIGABYTE)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "fifo": _fifo,
    "socket": _socket,
    "zeros for ever": _link("/dev/zero"),
    "null": _link("/dev/null"),
    "random for ever": _link("/dev/urandom"),
    "link to nothing": _link("{strangers}/nothing"),
    "link to itself": _link("{path}"),
    "link to a folder": _link("{strangers}"),
    "link to a stranger": _stranger,
    "folder": _folder,
    "sparse": _sparse,
    "sparse tail": _tail,
    "gone": lambda path, strangers: path.unlink(missing_ok=True),
    "empty": _bytes(lambda before: b""),
    "cut": _bytes(lambda before: before[: len(before) // 2]),
    "zeros": _bytes(lambda before: bytes(4096)),
    "noise": _bytes(lambda before: rng.integers16(1, "noise", 2048).astype("<u2").tobytes()),
    "number": _bytes(lambda before: b"5\n"),
    "text": _bytes(lambda before: b'"text"\n'),
    "list": _bytes(lambda before: b"[1, 2]\n"),
    "object": _bytes(lambda before: b"{}\n"),
    "deep": _bytes(lambda before: b"[" * 100_000 + b"\n"),
    "long key": _bytes(lambda before: b'{"' + b"\x1b[31mk" * 1_000_000 + b'": 1}\n'),
    "surrogate": _bytes(lambda before: b'{"step": "\\ud800", "\\u0000": 1}\n'),
    "UTF-16": _bytes(lambda before: "{}".encode("utf-16")),
    "latin": _bytes(lambda before: b'{"caf\xe9": 1}\n'),
}
"""What may lie there -> how it is put there, given the path and a folder of files that must not change."""


def plant(kind: str, path: Path, strangers: Path) -> None:
    """Put a kind of KINDS in the place of the file `path`; `strangers` is a folder outside, for what links point to."""
    strangers.mkdir(exist_ok=True)
    KINDS[kind](path, strangers)


def put(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return nested settings with one of them changed, which is named with dots."""
    first, _, rest = name.partition(".")
    section = values.get(first)
    inside: dict[str, Any] = section if isinstance(section, dict) else {}
    return values | {first: put(inside, rest, value) if rest else value}


def drawn(cases: Sequence[Any], count: int, name: str) -> list[Any]:
    """Return `count` of the cases, always the same ones."""
    return [cases[i] for i in rng.choose(0, name, len(cases), min(count, len(cases))).tolist()]


def played(cases: Sequence[tuple[str, ...]], play: Callable[..., Any]) -> list[Any]:
    """Play every case and return what each gave; AssertionError names all that failed."""
    results, failed = [], []
    for case in cases:
        try:
            results.append(play(*case))
        except AssertionError as error:
            failed.append(f"{', '.join(case)}: {error}")
    assert not failed, f"{len(failed)} of {len(cases)}:\n" + "\n".join(failed)
    return results


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and what is in them, to tell later whether one was changed."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Ran(NamedTuple):
    """What a command did."""

    argv: list[str]
    code: int
    """Exit code; below 0: the signal that ended it (-9: it was stopped, as it hung or took too much time)."""
    out: str
    err: str
    seconds: float
    """Of processor time."""
    megabytes: float
    """Resident at most; Python, numpy and a framework are about 300 of them."""


class Slow(AssertionError):
    """A command took too much processor time."""


def judge(ran: Ran, codes: Sequence[int] = (0, 2), untouched: float = 0.0) -> None:
    """AssertionError unless a command did its work, or refused in one short line; either in little time and memory.

    `untouched`: seconds of processor time of a command that takes long where nothing is wrong; SECONDS may be added.
    """
    assert "Traceback" not in ran.err, f"{ran.argv}: {ran.err[-3000:]}"
    assert ran.code in codes, f"{ran.argv}: ended with {ran.code}: {ran.err[-1000:]}"
    if ran.seconds > untouched + SECONDS:
        raise Slow(f"{ran.argv}: {ran.seconds:.1f} s of processor time, untouched {untouched:.1f}")
    assert ran.megabytes <= MEGABYTES, f"{ran.argv}: {ran.megabytes:.0f} MB"
    if ran.code == 2:
        line = ran.err.removesuffix("\n")
        assert line and len(line) <= LINE, f"{ran.argv}: {len(line)} characters: {line[:1000]}"
        assert line.isprintable(), f"{ran.argv}: {line!r}"


class Server:
    """A process that runs `skc` command lines, each in a fork of its own; `with` or `close` ends it."""

    def __init__(self, imports: Sequence[str] = ("core.cli", "backends.cuda.engine", "core.verbs.train")) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shared_tests.support.hostile", *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def run(self, argv: Sequence[str], cwd: Path | None = None) -> Ran:
        """Run a command line of `skc` to its end, or for WAIT seconds."""
        assert self._process.stdin and self._process.stdout
        json.dump({"argv": list(argv), "cwd": str(cwd or os.getcwd())}, self._process.stdin)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve() -> None:
    import importlib

    for name in sys.argv[1:]:
        importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as name:
            child = os.fork()
            if not child:
                _child(request, Path(name))
            status, usage = _wait(child)
            code = os.waitstatus_to_exitcode(status)
            out, err = ((Path(name) / side).read_text("utf-8", "replace") for side in ("out", "err"))
        found = Ran(request["argv"], code, out, err, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / _UNIT)
        print(json.dumps(found._asdict()), flush=True)


_UNIT = 1 << (10 if sys.platform.startswith("linux") else 20)
"""Of ru_maxrss, in a megabyte."""


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    """Wait for a child, and stop it if it hangs."""
    ends = time.monotonic() + WAIT
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            return os.wait4(child, 0)[1:]
        select.select([], [], [], 0.005)


def _child(request: dict[str, Any], folder: Path) -> None:
    """Run one command line in this fork, and end it."""
    code = 70
    try:
        for handle, name in ((1, "out"), (2, "err")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(file, handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        own = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (own + 3 * int(SECONDS), own + 3 * int(SECONDS)))
        os.chdir(request["cwd"])
        from core.cli import main

        code = main(request["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 71
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def copied(source: Path, target: Path) -> Path:
    """Copy a folder with its links as they are, in place of what `target` held, and return it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


if __name__ == "__main__":
    _serve()
