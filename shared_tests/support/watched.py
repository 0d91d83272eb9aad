"""What runs in the watched process of test_isolation.py: an honest evaluation, and planted thefts."""

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from core.files import append_file, locked, open_input

HELD: list[BinaryIO] = []

HERE = "shared_tests.support.watched"

PYTHON_WAYS = ("open", "relative", "symlink", "memmap")

NATIVE_WAYS = ("handle", "open_native", "fopen_native")
"""Out of the hook's sight: relative to a folder's handle, and past Python."""


def honest(path: str, folder: str) -> str:
    """Read an input by a relative name, and keep a ledger of one's own."""
    os.chdir(os.path.dirname(path))
    with open_input(os.path.basename(path)) as file:
        text = file.read()
    ledger = os.path.join(folder, "ledger")
    with open(ledger, "ab") as out:
        out.write(text)
    with open(ledger, "rb") as back:
        return back.read().decode()


def steal(folder: str) -> dict[str, int]:
    """Read one training file in each way and return the bytes that were got."""
    path = {way: os.path.join(folder, way) for way in (*PYTHON_WAYS, *NATIVE_WAYS)}
    got: dict[str, bytes] = {}
    with open(path["open"], "rb") as file:
        got["open"] = file.read()
    os.chdir(folder)
    got["relative"] = Path("relative").read_bytes()
    os.symlink(path["symlink"], "../innocent")
    got["symlink"] = Path("../innocent").read_bytes()
    got["memmap"] = bytes(np.memmap(path["memmap"], mode="r")) if os.path.getsize("memmap") else b""
    if not got["memmap"]:
        os.close(os.open(path["memmap"], os.O_RDONLY))
    os.chdir("/")
    handle = os.open(folder, os.O_RDONLY)
    got["handle"] = os.read(os.open("handle", os.O_RDONLY, dir_fd=handle), 100)
    libc = ctypes.CDLL(None)
    got["open_native"] = os.read(libc.open(path["open_native"].encode(), os.O_RDONLY), 100)
    libc.fopen.restype = ctypes.c_void_p
    libc.fread.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    buffer = ctypes.create_string_buffer(100)
    libc.fread(buffer, 1, 100, libc.fopen(path["fopen_native"].encode(), b"rb"))
    got["fopen_native"] = buffer.value
    return {way: len(text) for way, text in got.items()}


def stray(inputs: list[str], others: list[str]) -> None:
    """Read some files through the opener and some not."""
    for path in inputs:
        open_input(path).close()
    for path in others:
        open(path, "rb").close()


def reach(port: int) -> None:
    """Try to connect, by Python and past it."""
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", port))
    with socket.socket() as other:
        address = int(socket.AF_INET).to_bytes(2, sys.byteorder) + (port + 1).to_bytes(2, "big") + bytes([127, 0, 0, 1])
        ctypes.CDLL(None).connect(other.fileno(), address + bytes(8), 16)


def start() -> None:
    """Start a program."""
    subprocess.run(["/bin/sh", "-c", "exit 0"], check=True)


def fail(path: str) -> None:
    """Raise what a bad input raises."""
    from core.data.shards import DataError

    raise DataError(f"{path}: magic: 0")


def die(path: str) -> None:
    """Read a file and be killed."""
    open(path, "rb").close()
    os.kill(os.getpid(), signal.SIGKILL)


def wait(path: str) -> None:
    """Say that we are there, by a lock that ends with us, and stay."""
    hold(path)
    time.sleep(600)


def hold(path: str) -> None:
    """Lock a file until this process and its copies have ended."""
    HELD.append(append_file(path))
    assert locked(HELD[0])
    HELD[0].write(b"here")
    HELD[0].flush()


def leave(path: str) -> str:
    """Leave a copy of this process behind that never ends."""
    hold(path)
    if os.fork() == 0:
        time.sleep(600)
    return "done"


def variables() -> dict[str, str]:
    """Return what the environment says."""
    return dict(os.environ)


def import_value(module: str) -> Any:
    """Import a module and return its value."""
    return importlib.import_module(module).VALUE


def read_and_die(path: str) -> None:
    """Read an input through the opener, and be killed."""
    open_input(path).close()
    os.kill(os.getpid(), signal.SIGKILL)


def leave_note() -> None:
    """Write where later processes read what modules are compiled to."""
    place = Path(str(sys.pycache_prefix)) / "note.pyc"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"a text")


def spy(process: int) -> None:
    """Look into another process, in both ways."""
    local, remote = (ctypes.c_size_t * 2)(0, 0), (ctypes.c_size_t * 2)(0, 0)
    ctypes.CDLL(None).process_vm_readv(process, local, 1, remote, 1, 0)
    with contextlib.suppress(OSError):
        open(f"/proc/{process}/mem", "rb").close()
