"""The heartbeat of a run with several ranks: a dead rank ends the others within a minute, a slow one does not.

Apart from the collectives, which may wait long for a rank that compiles or evaluates: a thread of every rank tells
rank 0 once a second that its process lives, and rank 0 tells the others. A process that dies closes its connection; a
machine that dies falls silent.
"""

import hmac
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from core.console import one_line
from core.engine.ranks import Ranks, Stopped, agree

BEAT = 1.0
"""Seconds between beats."""
SILENCE = 30.0
"""Seconds without a beat after which a rank counts as dead."""
CONNECT = 60.0
"""Seconds that a rank may take to connect."""

Lost = Callable[[str | None], None]


def end_process(message: str | None) -> None:
    """End this process at once, since its main thread may wait for ever in a collective; say why, unless others do."""
    if message is not None:
        # one write with its end of line: MLX's ring writes of the dead peer too, piece by piece, from its own thread
        sys.stderr.write(one_line(message) + "\n")
        sys.stderr.flush()
    os._exit(1)


HEARING = 2.0
"""Seconds that a rank which fails waits for news of another that died, and was the cause."""


class Heartbeat:
    """A context: inside it, this rank is heard and hears the others; `lost` is called, in a thread, if one is gone.

    Leaving it says goodbye, or, with an exception, tells the others what it was.
    """

    def __init__(
        self, ranks: Ranks, lost: Lost = end_process, beat: float = BEAT, silence: float = SILENCE, hint: str = ""
    ) -> None:
        self._ranks, self._lost, self._beat, self._silence, self._hint = ranks, lost, beat, silence, hint
        self._stop = threading.Event()
        self._reason = b"bye"
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        """Connect to the other ranks."""
        ranks = self._ranks
        if ranks.world == 1:
            return self
        server = socket.create_server(("", 0), backlog=ranks.world) if ranks.rank == 0 else None
        port = server.getsockname()[1] if server else 0
        port, key = agree(ranks, [port, secrets.token_hex(16)])
        if server:
            sockets = _accept(server, ranks.world - 1, key)
        else:
            sockets = {0: _connect(ranks.address, port, key, ranks.rank)}
        self._thread = threading.Thread(target=self._run, args=(sockets,), name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Say goodbye."""
        if error is not None and not isinstance(error, Stopped):
            self._reason = b"failed " + one_line(f"{type(error).__name__}: {error}").encode()
            if (
                self._thread is not None
            ):  # a collective fails at once when a rank dies: who hears that of it speaks first
                self._thread.join(timeout=HEARING)
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * self._beat)

    def _run(self, sockets: dict[int, socket.socket]) -> None:
        """Send beats and watch for those of the other end; rank 0 passes on what it hears of a lost rank."""
        heard = dict.fromkeys(sockets, time.monotonic())
        rests = dict.fromkeys(sockets, b"")
        following = 0.0
        while not self._stop.is_set():
            if time.monotonic() >= following:
                _send(sockets, b"beat\n")
                following = time.monotonic() + self._beat
            ready, _, _ = select.select(list(sockets.values()), [], [], self._beat / 4)
            now = time.monotonic()
            for rank, connection in list(sockets.items()):
                gone = None
                if connection not in ready:
                    if now - heard[rank] > self._silence:
                        gone = f"was not heard for {self._silence:.0f} s"
                else:
                    try:
                        data = connection.recv(4096)
                    except OSError:
                        data = b""
                    heard[rank] = now
                    *lines, rests[rank] = (rests[rank] + data).split(b"\n")
                    for line in lines:
                        word, _, text = line.partition(b" ")
                        if word == b"bye":
                            del sockets[rank]
                            connection.close()
                            break
                        if word == b"lost":
                            return self._tell({}, None)  # rank 0 has said it
                        if word == b"failed":
                            gone = f"failed ({text.decode(errors='replace')})"
                    if rank in sockets and not data and gone is None:
                        gone = "ended without a word (killed?)"
                if gone is not None:
                    others = {r: s for r, s in sockets.items() if r != rank}
                    known = self._ranks.rank and gone.startswith("failed")  # rank 0 has said it
                    return self._tell(others, None if known else f"rank {rank} {gone}")
            if not sockets:
                return None
        _send(sockets, self._reason + b"\n")
        for connection in sockets.values():
            connection.close()
        return None

    def _tell(self, others: dict[int, socket.socket], what: str | None) -> None:
        """Pass the news on, then act on it, unless this rank is leaving anyway."""
        _send(others, b"lost\n")
        if not self._stop.is_set():
            self._lost(what and f"{what}; all ranks stop; {self._hint}")


def _send(sockets: dict[int, socket.socket], data: bytes) -> None:
    for connection in sockets.values():
        try:
            connection.sendall(data)
        except OSError:  # whoever is gone is noticed when it is read
            continue


def _accept(server: socket.socket, count: int, key: str) -> dict[int, socket.socket]:
    """Return the connections of `count` other ranks, each of which has shown `key`."""
    connections: dict[int, socket.socket] = {}
    server.settimeout(CONNECT)
    with server:
        while len(connections) < count:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted({*range(1, count + 1)} - set(connections))
                raise HeartbeatError(
                    f"ranks {missing} did not connect to rank 0 within {CONNECT:.0f} s: a firewall between the nodes?"
                ) from None
            connection.settimeout(CONNECT)
            shown, _, rank = _line(connection).partition(b" ")
            if hmac.compare_digest(shown, key.encode()) and rank.isdigit():
                connections[int(rank)] = connection
            else:
                connection.close()
    return connections


def _line(connection: socket.socket) -> bytes:
    """Return the first line that comes, without what comes after it; nothing where none does."""
    line = b""
    try:
        while len(line) < 64 and not line.endswith(b"\n") and (byte := connection.recv(1)):
            line += byte
    except OSError:
        return b""
    return line.removesuffix(b"\n")


def _connect(host: str, port: int, key: str, rank: int) -> socket.socket:
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT)
    except OSError as error:
        raise HeartbeatError(
            f"rank {rank} cannot reach rank 0 at {host}:{port} ({error}): open the ports between the nodes"
        ) from error
    connection.sendall(f"{key} {rank}\n".encode())
    return connection


class HeartbeatError(ValueError):
    """The ranks cannot hear each other."""
