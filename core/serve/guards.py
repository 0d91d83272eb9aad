"""What stands in front of every route: whose requests are answered, how much they may ask for, what answers carry."""

import json
from collections.abc import Iterable
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.files import FileError, parse_json
from core.formats.kinds import Kind, check_value
from core.serve.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine, by which only this machine is reached."""
WILDCARDS = ("", "0.0.0.0", "::")
"""Addresses of a machine that is reached by any of its names."""
MOST_VALUES = 4096
"""Values of a request's JSON."""
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""What every answer carries: nothing from elsewhere, nothing told elsewhere, nothing kept."""
CURE = "see docs/serve.md"


class Refused(Exception):
    """A request that is not answered: the status, and what to tell whoever made it."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers


def refusal(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """Return the answer that tells what is wrong, in the form of OpenAI's errors."""
    return JSONResponse(error_object(status, message, param), status, headers)


def error_object(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return what is wrong in the form of OpenAI's errors, which all routes use."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Guard:
    """An ASGI application in front of another: refuses foreign names and pages, adds HEADERS to every answer.

    A page of another site can make a browser on this machine send requests here, also under a name of its own that
    leads here (DNS rebinding). Both say so: in Origin, and in Host.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app, self._hosts = app, frozenset(name.lower() for name in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let the other application answer."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            raise RuntimeError(f"a connection of type {scope['type']}")  # uvicorn runs without web sockets

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                theirs = {name.lower() for name, _ in message["headers"]}
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in theirs)]
            await send(message)

        problem = self._problem([(name, value.decode("latin-1")) for name, value in scope["headers"]])
        app = self._app if problem is None else refusal(403, problem)
        await app(scope, receive, with_headers)

    def _problem(self, headers: list[tuple[bytes, str]]) -> str | None:
        """Return why a request is refused by its headers; None: it is not."""
        hosts, origins = ([value for name, value in headers if name == wanted] for wanted in (b"host", b"origin"))
        if len(hosts) != 1 or host_name(hosts[0]) not in self._hosts:
            return f"Host {hosts[0][:100] if hosts else ''}: is not a name of this server; --allow NAME makes it one"
        if any(origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins):
            return f"Origin {origins[0][:100]}: pages of other sites get no answer"
        return None


def host_name(host: str) -> str:
    """Return the name in a Host header, without the port, in lower case."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdecimal() else host).lower()


def allowed_hosts(host: str, allow: Iterable[str]) -> list[str]:
    """Return the names under which a server at the address `host` answers: its own, and those that were given."""
    own = () if host in WILDCARDS else (f"[{host}]" if ":" in host else host,)
    return [*LOOPBACK, *own, *allow]


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return a request's body, once all of it has come, within the limits of bytes and of time; Refused."""
    with anyio.move_on_after(limits.seconds):
        return await _whole_body(request, limits.body)
    raise Refused(408, f"the request did not arrive within {limits.seconds:g} seconds")


async def _whole_body(request: Request, most: int) -> bytes:
    too_long = Refused(413, f"the request has over {most:,} bytes, the most that this server takes (--body)")
    length = request.headers.get("content-length", "0")
    if len(length) > 15 or int(length) > most:  # a number: the server parsed it
        raise too_long
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:  # in chunks, whose length nothing says beforehand
                raise too_long
            parts.append(part)
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None
    return b"".join(parts)


async def read_json(request: Request, kind: Kind, limits: Limits) -> dict[str, Any]:
    """Return a request's JSON object, once it is what `kind` says; Refused names what is wrong."""
    body = await read_body(request, limits)
    try:
        value = parse_json("the request", body.decode(), MOST_VALUES)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are no text
    except FileError as error:
        reason = f"not JSON ({error.__cause__})" if error.__cause__ else f"over {MOST_VALUES:,} values"
        raise Refused(400, f"the request: {reason}") from error
    except UnicodeError as error:
        raise Refused(400, "the request is not valid Unicode, expected UTF-8") from error
    try:
        check_value(value, kind, "the request", CURE)
    except FileError as error:
        raise Refused(400, str(error)) from error
    return value
