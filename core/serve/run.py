"""How routes become a server: guarded, on an address that is held before anything is said, until Ctrl-C."""

import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from core.checks import ConfigError, require
from core.serve.connections import ACCEPTED, Connection
from core.serve.guards import WILDCARDS, Guard, Refused, allowed_hosts, refusal

GRACE = 2
"""Seconds that answers have to end when the server stops."""


def application(routes: Sequence[BaseRoute], hosts: Iterable[str]) -> ASGIApp:
    """Return the guarded application of some routes, which answers under the names `hosts`."""
    handlers: dict[Any, Any] = {Refused: _refused, HTTPException: _not_there, Exception: _failed}
    return Guard(Starlette(routes=list(routes), exception_handlers=handlers), hosts)


async def _refused(request: Request, error: Refused) -> Response:
    return refusal(error.status, error.message, error.param, error.headers)


async def _not_there(request: Request, error: HTTPException) -> Response:
    return refusal(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(500, "an error of the server's; its terminal shows which")  # and starlette raises it again


def check_address(host: str, port: int, allow: Sequence[str]) -> None:
    """Raise ConfigError for an address that no server can have, or that needs names it was not given."""
    require(0 <= port <= 65_535, f"--port {port}: expected 0 (any that is free) to 65535")
    require(
        host not in WILDCARDS or bool(allow),
        f"--host {host}: is reached by any name; say by which it may be: --allow NAME",
    )
    for name in allow:
        good = bool(name) and name.isascii() and name.isprintable() and not set(name) & set("/ @*")
        require(good, f"--allow {name}: expected the name of a host, without http:// and path")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; ConfigError in one line where that cannot be."""
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; take another, --port 0 for any") from error


class Server(uvicorn.Server):
    """uvicorn's server, which tells the work that is under way when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop, as uvicorn does."""
        self._stopping.set()
        super().handle_exit(sig, frame)


def serve_routes(
    routes: Sequence[BaseRoute],
    host: str,
    port: int,
    allow: Sequence[str],
    ready: Callable[[str], None],
    stopping: threading.Event,
    listening: socket.socket | None = None,
) -> None:
    """Answer requests until Ctrl-C; ConfigError for an address that cannot be had.

    `ready` gets the URL once requests are answered; `stopping` is set when no more are. `listening`: what `listen`
    returned for this address.
    """
    check_address(host, port, allow)
    with listening or listen(host, port) as place:
        shown = "127.0.0.1" if host in WILDCARDS else f"[{host}]" if ":" in host else host
        app = application(routes, allowed_hosts(host, allow))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off", loop="asyncio",
            http=Connection, timeout_graceful_shutdown=GRACE, proxy_headers=False, backlog=ACCEPTED,
        )  # fmt: skip
        ready(f"http://{shown}:{place.getsockname()[1]}/")
        try:
            Server(config, stopping).run([place])
        except KeyboardInterrupt:  # uvicorn has ended by then, and raises the signal that it caught again
            return
        finally:
            stopping.set()
