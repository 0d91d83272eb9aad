"""How ranks come together: their numbers are checked first, and a rank that waits says for whom, and not for ever."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from core.config import ConfigError
from core.files import read_json

FIRST, AGAIN, LIMIT = 5.0, 60.0, 600.0
"""Seconds after which a waiting rank says so, says so again, and gives up."""
WATCHER = """
import os, select, signal, sys, time
words, (due, again, limit), pid = sys.argv[1], map(float, sys.argv[2:5]), int(sys.argv[5])
say = lambda text: print(words + text, file=sys.stderr, flush=True)
began = time.monotonic()
while True:
    if select.select([0], [], [], max(0.0, began + min(due, limit) - time.monotonic()))[0]:
        sys.exit()
    if due >= limit:
        break
    say(f" ({due:.0f} s so far; it gives up after {limit:.0f} s)")
    due += again
say(f": nobody came within {limit:.0f} s; start every rank, each with its own number")
os.kill(pid, signal.SIGTERM)
"""
"""A process of its own: MLX's join lets no thread of this one run."""


def unnumbered() -> None:
    """Raise ConfigError where a launcher has begun to number processes and this one has no number."""
    world = os.environ.get("WORLD_SIZE") or "1"
    for name in ("RANK", "MLX_RANK"):
        if name in os.environ and (name != "RANK" or "WORLD_SIZE" in os.environ):
            _number(name, 0, None)
    if "RANK" not in os.environ and world != "1":
        raise ConfigError(f"WORLD_SIZE={world[:40]!r}, but RANK is not set: start the ranks with torchrun")


def check_numbers(backend: str) -> str:
    """Return for whom this rank waits, in words; ConfigError if what the launcher has set cannot be."""
    rank, world, place = _cuda() if backend == "cuda" else from_mlx_launch()[1:]
    if world == 2 or rank:
        others = f"rank {1 - rank}" if world == 2 else f"rank 0 and whoever of the {world} ranks is missing"
    else:
        others = f"whoever of ranks 1 to {world - 1} is missing"
    return f"rank {rank} of {world} waits for {others} at {place}"


def _cuda() -> tuple[int, int, str]:
    world = _number("WORLD_SIZE", 1, None)
    rank = _number("RANK", 0, world)
    if "LOCAL_RANK" in os.environ:
        here = _number("LOCAL_WORLD_SIZE", 1, world + 1) if "LOCAL_WORLD_SIZE" in os.environ else world
        _number("LOCAL_RANK", 0, here)
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise ConfigError("MASTER_ADDR is not set: it names the machine of rank 0; start the ranks with torchrun")
    return rank, world, f"{host}:{_number('MASTER_PORT', 1, 65536)}"


def from_mlx_launch() -> tuple[str, int, int, str]:
    """Return (MLX's name of the connection, rank, ranks, address and port of rank 0) as mlx.launch has set them.

    JACCL (`--backend jaccl` or `jaccl-ring`) has a file of RDMA devices and a coordinator, a ring a file of hosts.
    """
    jaccl = "MLX_IBV_DEVICES" in os.environ or "MLX_JACCL_COORDINATOR" in os.environ
    variable = "MLX_IBV_DEVICES" if jaccl else "MLX_HOSTFILE"
    file = os.environ.get(variable)
    if not file:
        also = "MLX_JACCL_COORDINATOR" if jaccl else "MLX_RANK"
        hint = "mlx.launch, --backend ring or jaccl"
        raise ConfigError(f"{also} is set but {variable} is not: start the ranks with {hint}")
    try:
        listed = read_json(file)
        hosts = [str(host[0]) for host in listed] if isinstance(listed, list) else None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{variable}={file}: no connection can be made of it ({error}): use mlx.launch") from error
    if not hosts:  # no list at all is taken like an empty one
        raise ConfigError(f"{variable}={file}: names no host: use mlx.launch")
    first = os.environ.get("MLX_JACCL_COORDINATOR", "") if jaccl else hosts[0]
    host, _, port = first.rpartition(":")
    if not host or not port.isdecimal():
        where = "MLX_JACCL_COORDINATOR" if jaccl else f"{variable}={file}"
        raise ConfigError(f"{where}: rank 0 at {first[:40]!r}, expected its address and port: use mlx.launch")
    return "jaccl" if jaccl else "ring", _number("MLX_RANK", 0, len(hosts)), len(hosts), first


def _number(name: str, low: int, end: int | None) -> int:
    """Return a whole number of the environment from `low` to below `end`; ConfigError."""
    text = os.environ.get(name)
    expected = f"expected a whole number from {low}{'' if end is None else f' to {end - 1}'}"
    if text is None:
        raise ConfigError(f"{name} is not set: {expected}; start the ranks with torchrun")
    digits = text.isascii() and text.isdecimal() and len(text) < 10
    if not (digits and low <= int(text) and (end is None or int(text) < end)):
        raise ConfigError(f"{name}={text[:40]!r}: {expected}")
    return int(text)


@contextmanager
def watched(words: str) -> Iterator[None]:
    """Say `words` on standard error while the block takes long, and end this process if it takes too long."""
    command = [sys.executable, "-I", "-S", "-c", WATCHER, words, *map(str, (FIRST, AGAIN, LIMIT, os.getpid()))]
    ours = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if ours else {}
    with subprocess.Popen(command, stdin=subprocess.PIPE) as watcher:
        for number in before:  # Python's own handlers would wait for the block
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{words}, but cannot join ({reason}): is another run there, or do two ranks have one number?"
            ) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            assert watcher.stdin is not None
            watcher.stdin.close()
