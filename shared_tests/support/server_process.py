"""A server in a process of its own, as a user starts one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Process(NamedTuple):
    """A server that answers, and its process."""

    url: str
    child: subprocess.Popen[str]


@contextmanager
def server(verb: str, *arguments: str) -> Iterator[Process]:
    """Start `skc VERB ... --port 0`, yield where it answers, and end it as Ctrl-C does; it must say that it stopped."""
    command = [sys.executable, "-m", "core.cli", verb, *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        said: list[str] = []
        try:
            for line in child.stdout:
                said.append(line)
                if line.startswith("http://"):
                    yield Process(line.split()[0].rstrip("/"), child)
                    break
            else:
                raise AssertionError("".join(said))
        finally:
            child.send_signal(signal.SIGINT)
            rest = child.communicate(timeout=60)[0]
        assert child.returncode == 0 and rest == "stopped\n", (child.returncode, rest)
